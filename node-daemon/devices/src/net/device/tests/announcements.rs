//! What a device says of its guest's addresses: on request, after a migration, after a reset.

use super::*;

#[test]
fn an_announcement_sends_rarp_and_requests_one_from_the_guest() {
    let mut bench = started(F_STATUS | F_CTRL_VQ | F_GUEST_ANNOUNCE);
    assert_eq!(
        bench.handle.announce().unwrap(),
        1,
        "no address is known yet"
    );
    assert_eq!(received(&bench.network)[24..26], [0x80, 0x35]);
    assert_eq!(bench.driver.config(6, 2), [3, 0], "VIRTIO_NET_S_ANNOUNCE");

    let command = bench.driver.buffer(2, 0);
    bench
        .driver
        .ram
        .write_slice(&[3, 0], GuestAddress(command))
        .unwrap();
    let ack = bench.driver.buffer(1, 0);
    bench
        .driver
        .ram
        .write_obj(0xEE_u8, GuestAddress(ack))
        .unwrap();
    let chain = [Buffer::readable(command, 2), Buffer::writable(ack, 1)];
    bench.driver.offer(CONTROL, &chain);
    bench.driver.notify(CONTROL);
    bench.driver.used(CONTROL);
    assert_eq!(guest_bytes(&bench.driver, ack, 1), [0]);
    assert_eq!(bench.driver.config(6, 2), [1, 0]);

    bench
        .driver
        .ram
        .write_slice(&[1, 0], GuestAddress(command))
        .unwrap();
    bench.driver.offer(CONTROL, &chain);
    bench.driver.notify(CONTROL);
    bench.driver.used(CONTROL);
    assert_eq!(
        guest_bytes(&bench.driver, ack, 1),
        [1],
        "others are refused"
    );
}

#[test]
fn a_guest_without_guest_announce_gets_no_announce_request() {
    let mut bench = started(F_STATUS);
    bench.handle.announce().unwrap();
    assert_eq!(bench.driver.config(6, 2), [1, 0]);
}

#[test]
fn after_a_migration_the_guests_addresses_are_announced_before_it_runs() {
    let mut bench = started(F_STATUS | F_MRG_RXBUF);
    let address = Ipv4Addr::new(10, 1, 2, 3);
    let arp = announcements(MAC, &[guest_ip(address)]).remove(1);
    offer_send(&mut bench.driver, &arp);
    bench.driver.notify(TX);
    bench.driver.used(TX);
    let (head, buffer) = offer_receive(&mut bench.driver, 1526);
    bench.handle.set_link(false);

    let other = TestMachine::with_ram(bench.machine.ram.clone());
    let (tap, network) = tap();
    let fresh = make(&other, tap);
    assert_eq!(bench.driver.function.pause(), WriterState::Clean);
    let saved = bench.driver.function.save();
    drop(bench.network);
    let NetDevice {
        mut function,
        handle,
        ..
    } = fresh;
    assert_eq!(function.pause(), WriterState::Clean);
    network.send(&frame(60, 4)).unwrap();
    function.restore(&saved).unwrap();
    network.send(&frame(60, 5)).unwrap();
    assert_eq!(handle.announce().unwrap(), 2);
    assert_eq!(received(&network)[24..26], [0x80, 0x35]);
    assert_eq!(received(&network)[40..44], address.octets());
    assert!(
        bench.driver.poll_used(RX).is_none(),
        "a paused device delivers nothing"
    );

    function.resume();
    bench.driver.continue_on(function);
    assert_eq!(bench.driver.used(RX), (head, 72));
    assert_eq!(guest_bytes(&bench.driver, buffer + 12, 60), [5; 60]);
    assert_eq!(bench.driver.config(6, 2), [0, 0], "the link is still down");
}

/// What the network said last while the source did not listen any more is in the destination's tap. In IPv4 the new
/// machine says so with ARP, in IPv6 with a neighbor advertisement.
#[test]
fn an_address_that_moved_away_is_not_announced_after_a_migration() {
    for (addresses, at) in [
        (["10.1.2.3", "10.1.2.100", "10.1.2.101"], 40),
        (["fd00::3", "fd00::100", "fd00::101"], 74),
    ] {
        let [own, moved, late] = addresses.map(|address| address.parse::<IpAddr>().unwrap());
        let claims = |mac, address| {
            let claimed = GuestIp {
                address,
                router: false,
            };
            announcements(mac, &[claimed]).remove(1)
        };
        let mut bench = started(F_STATUS | F_MRG_RXBUF);
        for address in [own, moved, late] {
            offer_send(&mut bench.driver, &claims(MAC, address));
            bench.driver.notify(TX);
            bench.driver.used(TX);
        }
        let other_machine = MacAddress([2; 6]);
        offer_receive(&mut bench.driver, 1526);
        bench.network.send(&claims(other_machine, moved)).unwrap();
        bench.driver.used(RX);

        let other = TestMachine::with_ram(bench.machine.ram.clone());
        let (tap, network) = tap();
        let NetDevice {
            mut function,
            handle,
            ..
        } = make(&other, tap);
        assert_eq!(bench.driver.function.pause(), WriterState::Clean);
        let saved = bench.driver.function.save();
        assert_eq!(function.pause(), WriterState::Clean);
        network.send(&claims(other_machine, late)).unwrap();
        function.restore(&saved).unwrap();
        assert_eq!(handle.announce().unwrap(), 2, "RARP, and {own}");
        assert_eq!(received(&network)[24..26], [0x80, 0x35]);
        let announced = received(&network);
        match own {
            IpAddr::V4(own) => assert_eq!(announced[at..at + 4], own.octets()),
            IpAddr::V6(own) => assert_eq!(announced[at..at + 16], own.octets()),
        }
    }
}

/// What the guest was called before the reset must not be announced after a migration.
#[test]
fn a_reset_forgets_the_addresses_of_the_guest_and_keeps_the_link() {
    let mut bench = golden_bench();
    bench.handle.set_link(false);
    assert_eq!(bench.driver.function.pause(), WriterState::Clean);
    let learned = |state: &DeviceState| state.body["device"]["learned"].as_array().unwrap().len();
    assert_eq!(learned(&bench.driver.function.save()), 1);
    bench.driver.function.reset();
    let after = bench.driver.function.save();
    assert_eq!(learned(&after), 0);
    assert_eq!(after.body["device"]["status"], 0);
}
