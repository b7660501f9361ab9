use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Mutex, PoisonError};

use bascule_types::WriterState;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::device::Device;
use crate::net::learned::GuestIp;
use crate::net::tap::{HEADER_BYTES, TapFd};
use crate::state::DeviceState;
use crate::testing::{Buffer, TestDriver, TestMachine, assert_golden, migrate, rings, wait_until};

mod announcements;

const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
const RX: u16 = 0;
const TX: u16 = 1;
const CONTROL: u16 = 2;
const EVENT_IDX: u64 = 1 << 29;

/// A tap whose network is the other end of a datagram socket.
#[derive(Debug)]
struct TestTap {
    socket: UnixDatagram,
    offloads: Mutex<Vec<u32>>,
}

impl Tap for TestTap {
    fn raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
    fn receive(&self, frame: &mut [u8]) -> io::Result<usize> {
        self.socket.recv(frame)
    }
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.socket.send(frame).map(drop)
    }
    fn set_offloads(&self, flags: u32) -> io::Result<()> {
        self.offloads
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(flags);
        Ok(())
    }
}

fn tap() -> (Arc<TestTap>, UnixDatagram) {
    let (socket, network) = UnixDatagram::pair().unwrap();
    socket.set_nonblocking(true).unwrap();
    network
        .set_read_timeout(Some(std::time::Duration::from_secs(10)))
        .unwrap();
    let offloads = Mutex::default();
    (Arc::new(TestTap { socket, offloads }), network)
}

fn make(machine: &TestMachine, tap: Arc<TestTap>) -> NetDevice {
    make_with_mtu(machine, tap, (Some(1450), true))
}

fn make_with_mtu(
    machine: &TestMachine,
    tap: Arc<TestTap>,
    (mtu, refuses_larger_mtu): (Option<u16>, bool),
) -> NetDevice {
    let config = NetConfig {
        name: "net0".into(),
        mac: MAC,
        mtu,
        refuses_larger_mtu,
    };
    NetDevice::new(&config, tap, machine.context()).unwrap()
}

/// An address as the table has it.
fn guest_ip(address: Ipv4Addr) -> GuestIp {
    GuestIp {
        address: address.into(),
        router: false,
    }
}

struct Bench {
    machine: TestMachine,
    driver: TestDriver,
    handle: NetHandle,
    metrics: Arc<NetMetrics>,
    tap: Arc<TestTap>,
    network: UnixDatagram,
}

fn started(features: u64) -> Bench {
    let machine = TestMachine::new();
    let (tap, network) = tap();
    let device = make(&machine, tap.clone());
    let mut driver = TestDriver::new(&machine, device.function);
    driver.start(features, 3);
    Bench {
        machine,
        driver,
        handle: device.handle,
        metrics: device.metrics,
        tap,
        network,
    }
}

/// A frame from the network with an empty virtio-net header.
fn frame(length: usize, fill: u8) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    frame.resize(HEADER_BYTES + length, fill);
    frame
}

fn received(network: &UnixDatagram) -> Vec<u8> {
    let mut frame = vec![0; 70_000];
    let length = network.recv(&mut frame).unwrap();
    frame.truncate(length);
    frame
}

fn offer_receive(driver: &mut TestDriver, length: usize) -> (u16, u64) {
    let buffer = driver.buffer(length, 0);
    (
        driver.offer(RX, &[Buffer::writable(buffer, length)]),
        buffer,
    )
}

fn guest_bytes(driver: &TestDriver, at: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    driver.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn offer_send(driver: &mut TestDriver, frame: &[u8]) -> u16 {
    let buffer = driver.buffer(frame.len(), 0);
    driver.ram.write_slice(frame, GuestAddress(buffer)).unwrap();
    let (header, rest) = (HEADER_BYTES, frame.len() - HEADER_BYTES);
    let chain = [
        Buffer::readable(buffer, header),
        Buffer::readable(buffer + header as u64, rest),
    ];
    driver.offer(TX, &chain)
}

#[test]
fn virtio_5_1_4_the_configuration_has_mac_status_and_mtu() {
    let mut bench = started(0);
    assert_eq!(bench.driver.config(0, 6), MAC.0);
    assert_eq!(bench.driver.config(6, 2), [1, 0], "the link is up");
    assert_eq!(bench.driver.config(10, 2), 1450_u16.to_le_bytes());
    let generation = bench.driver.read8(0x15);
    bench.handle.set_link(false);
    assert_eq!(bench.driver.config(6, 2), [0, 0]);
    assert_ne!(bench.driver.read8(0x15), generation);
    assert_eq!(bench.driver.read8(0x1000), 2, "a configuration interrupt");
}

#[test]
fn a_frame_goes_out_with_the_header_that_the_guest_wrote() {
    let mut bench = started(F_CSUM | F_HOST_TSO4);
    let mut sent = frame(100, 7);
    sent[..10].copy_from_slice(&[1, 1, 66, 0, 0xA8, 5, 34, 0, 16, 0]);
    let head = offer_send(&mut bench.driver, &sent);
    bench.driver.notify(TX);
    assert_eq!(bench.driver.used(TX), (head, 0));
    assert_eq!(received(&bench.network), sent);
    let counts = bench.metrics.counts();
    assert_eq!((counts.sent_frames, counts.sent_bytes), (1, 100));
}

#[test]
fn a_received_frame_fills_one_buffer_and_sets_num_buffers() {
    let mut bench = started(0);
    let (head, buffer) = offer_receive(&mut bench.driver, 1526);
    bench.network.send(&frame(60, 9)).unwrap();
    assert_eq!(bench.driver.used(RX), (head, 72));
    let got = guest_bytes(&bench.driver, buffer, 72);
    assert_eq!(got[10..12], [1, 0], "num_buffers is 1 without merging too");
    assert_eq!(got[12..], [9; 60]);
}

#[test]
fn a_large_frame_is_spread_over_merged_buffers() {
    let mut bench = started(F_MRG_RXBUF | EVENT_IDX);
    let buffers: Vec<_> = (0..5)
        .map(|_| offer_receive(&mut bench.driver, 1000))
        .collect();
    bench.network.send(&frame(2500, 3)).unwrap();
    let lengths: Vec<_> = buffers[..3].iter().map(|_| bench.driver.used(RX)).collect();
    assert_eq!(
        lengths,
        [
            (buffers[0].0, 1000),
            (buffers[1].0, 1000),
            (buffers[2].0, 512)
        ]
    );
    assert_eq!(guest_bytes(&bench.driver, buffers[0].1 + 10, 2), [3, 0]);
    assert_eq!(guest_bytes(&bench.driver, buffers[2].1, 512), [3; 512]);
    bench.network.send(&frame(60, 4)).unwrap();
    assert_eq!(bench.driver.used(RX), (buffers[3].0, 72));
}

#[test]
fn frames_wait_for_buffers_and_keep_their_order() {
    let mut bench = started(F_MRG_RXBUF);
    for fill in 1..=3 {
        bench.network.send(&frame(60, fill)).unwrap();
    }
    let (head, buffer) = offer_receive(&mut bench.driver, 50);
    bench.driver.notify(RX);
    let (next, more) = offer_receive(&mut bench.driver, 1526);
    bench.driver.notify(RX);
    assert_eq!(bench.driver.used(RX), (head, 50));
    assert_eq!(bench.driver.used(RX), (next, 22));
    assert_eq!(guest_bytes(&bench.driver, buffer + 12, 38), [1; 38]);
    assert_eq!(guest_bytes(&bench.driver, more, 22), [1; 22]);
    for fill in 2..=3 {
        let (head, buffer) = offer_receive(&mut bench.driver, 1526);
        bench.driver.notify(RX);
        assert_eq!(bench.driver.used(RX), (head, 72));
        assert_eq!(guest_bytes(&bench.driver, buffer + 12, 60), [fill; 60]);
    }
}

#[test]
fn a_frame_that_fits_no_buffer_is_dropped_and_the_next_one_arrives() {
    let mut bench = started(0);
    let (head, buffer) = offer_receive(&mut bench.driver, 1526);
    bench.network.send(&frame(3000, 1)).unwrap();
    bench.network.send(&[0; HEADER_BYTES]).unwrap();
    bench.network.send(&frame(60, 2)).unwrap();
    assert_eq!(bench.driver.used(RX), (head, 72));
    assert_eq!(guest_bytes(&bench.driver, buffer + 12, 60), [2; 60]);
    assert_eq!(bench.metrics.counts().received_drops, 2);
}

#[test]
fn a_full_tap_holds_frames_back_and_loses_none() {
    let mut bench = started(EVENT_IDX);
    let count = 24_u8;
    for fill in 0..count {
        offer_send(&mut bench.driver, &frame(60, fill));
    }
    bench.driver.notify(TX);
    for fill in 0..count {
        assert_eq!(received(&bench.network)[HEADER_BYTES..], [fill; 60]);
    }
    for _ in 0..count {
        bench.driver.used(TX);
    }
    assert_eq!(bench.metrics.counts().sent_drops, 0);
}

#[test]
fn malformed_frames_are_dropped_and_their_buffers_returned() {
    let mut bench = started(0);
    let buffer = bench.driver.buffer(80_000, 0);
    for length in [HEADER_BYTES, 5, 80_000] {
        let head = bench.driver.offer(TX, &[Buffer::readable(buffer, length)]);
        bench.driver.notify(TX);
        assert_eq!(bench.driver.used(TX), (head, 0));
    }
    assert_eq!(bench.metrics.counts().sent_drops, 3);
    assert_eq!(bench.machine.failures.all(), []);
}

#[test]
fn offloads_are_those_that_the_guest_negotiated() {
    let bench = started(F_GUEST_CSUM | F_GUEST_TSO4);
    wait_until("the offloads", || {
        *bench.tap.offloads.lock().unwrap() == [1 | 2]
    });
}

#[test]
fn sending_and_receiving_go_on_after_a_migration() {
    let mut bench = started(F_MRG_RXBUF | EVENT_IDX);
    for fill in 0..3 {
        let other = TestMachine::with_ram(bench.machine.ram.clone());
        let (tap, network) = tap();
        migrate(&mut bench.driver, make(&other, tap).function);
        offer_send(&mut bench.driver, &frame(60, fill));
        bench.driver.notify(TX);
        assert_eq!(received(&network)[HEADER_BYTES..], [fill; 60]);
        offer_receive(&mut bench.driver, 1526);
        network.send(&frame(60, fill)).unwrap();
        bench.driver.used(RX);
        bench.driver.used(TX);
    }
}

#[test]
fn a_state_of_another_address_is_refused() {
    let mut bench = started(0);
    assert_eq!(bench.driver.function.pause(), WriterState::Clean);
    let mut saved = bench.driver.function.save();
    saved.body["device"]["mac"][5] = 7.into();
    let mut fresh = make(&bench.machine, tap().0).function;
    assert_eq!(fresh.pause(), WriterState::Clean);
    let text = fresh.restore(&saved).unwrap_err().to_string();
    assert!(
        text.contains(
            "the source has the address 52:54:00:12:34:07, this device 52:54:00:12:34:56"
        ),
        "{text}"
    );
}

#[test]
fn i7_a_receive_buffer_outside_of_memory_stops_the_device() {
    let mut bench = started(0);
    bench
        .driver
        .offer(RX, &[Buffer::writable(0xFFFF_0000, 1526)]);
    bench.network.send(&frame(60, 1)).unwrap();
    wait_until("NEEDS_RESET", || bench.driver.status() & 0x40 != 0);
    let text = bench.machine.failures.all()[0].to_string();
    assert!(text.starts_with("net0: bad virtqueue 0: "), "{text}");
}

#[test]
fn merged_buffers_appear_to_the_driver_all_at_once() {
    // A driver that finds fewer buffers than the header says drops the frame: so while a frame is
    // being delivered the used index may never stand in the middle of it.
    let mut bench = started(F_MRG_RXBUF);
    let used_index = GuestAddress(rings(RX)[2] + 2);
    let order = std::sync::atomic::Ordering::Acquire;
    let last: u16 = 6 * 1500;
    let ram = bench.driver.ram.clone();
    let watcher = std::thread::Builder::new()
        .name("watcher".into())
        .spawn(move || {
            loop {
                let index: u16 = ram.load(used_index, order).unwrap();
                if index == last || !index.is_multiple_of(6) {
                    return index;
                }
            }
        });
    let buffer = bench.driver.buffer(512, 0);
    for _ in 0..last / 6 {
        for _ in 0..6 {
            bench.driver.offer(RX, &[Buffer::writable(buffer, 512)]);
        }
        bench.driver.notify(RX);
        bench.network.send(&frame(3000, 1)).unwrap();
        for _ in 0..6 {
            bench.driver.used(RX);
        }
    }
    assert_eq!(watcher.unwrap().join().unwrap(), last);
}

/// A device that has the state `saved` on a network of `mtu`, in which a larger one is refused or
/// not; or why not.
fn restored(
    bench: &Bench,
    saved: &DeviceState,
    mtu: (Option<u16>, bool),
) -> Result<TestDriver, String> {
    let other = TestMachine::with_ram(bench.machine.ram.clone());
    let device = make_with_mtu(&other, tap().0, mtu);
    let mut function = device.function;
    assert_eq!(function.pause(), WriterState::Clean);
    function.restore(saved).map_err(|error| error.to_string())?;
    function.resume();
    let told = saved.body["device"]["mtu"].as_u64();
    assert_eq!(device.handle.offered_mtu().map(u64::from), told);
    Ok(TestDriver::new(&other, function))
}

#[test]
fn a_guest_keeps_its_announced_mtu_and_a_network_with_a_smaller_one_is_refused() {
    for (at_start, offered) in [(Some(9000), true), (None, false)] {
        let machine = TestMachine::new();
        let (tap, network) = tap();
        let device = make_with_mtu(&machine, tap.clone(), (at_start, true));
        let mut driver = TestDriver::new(&machine, device.function);
        driver.start(0, 3);
        assert_eq!(driver.function.pause(), WriterState::Clean);
        let saved = driver.function.save();
        let bench = Bench {
            machine,
            driver,
            handle: device.handle,
            metrics: device.metrics,
            tap,
            network,
        };
        let here = at_start.unwrap_or(0);
        for mtu in [None, Some(9000), Some(65535)] {
            let mut driver = restored(&bench, &saved, (mtu, true)).unwrap();
            assert_eq!(
                driver.config(10, 2),
                here.to_le_bytes(),
                "{at_start:?} on {mtu:?}"
            );
            let again = saved.body["features"].as_u64().unwrap();
            assert_eq!(again & F_MTU != 0, offered);
            assert_eq!(driver.function.pause(), WriterState::Clean);
            assert_eq!(driver.function.save().body["features"], again);
        }
        let narrower = restored(&bench, &saved, (Some(1500), true));
        match narrower {
            Err(text) => assert_eq!(
                (text.as_str(), at_start.is_some()),
                (
                    "net0: state does not fit: the guest uses an MTU of 9000 bytes, the network here has 1500",
                    true
                )
            ),
            Ok(_) => assert_eq!(at_start, None),
        }
        // A guest of which there is only the saved state is better off with it.
        let mut driver = restored(&bench, &saved, (Some(1500), false)).unwrap();
        assert_eq!(driver.config(10, 2), here.to_le_bytes());
    }
}

fn golden_bench() -> Bench {
    let mut bench = started(F_STATUS | F_MRG_RXBUF | EVENT_IDX);
    let arp = announcements(MAC, &[guest_ip(Ipv4Addr::new(10, 1, 2, 3))]).remove(1);
    offer_send(&mut bench.driver, &arp);
    bench.driver.notify(TX);
    bench.driver.used(TX);
    bench
}

#[test]
fn golden_state_version_1_is_still_read() {
    let bench = golden_bench();
    let golden = include_str!("../../../golden/virtio-net-v1.json");
    let state: DeviceState = serde_json::from_str(golden).unwrap();
    let mut driver = restored(&bench, &state, (Some(1450), true)).unwrap();
    assert_eq!(driver.function.pause(), WriterState::Clean);
    let again = driver.function.save();
    assert_eq!(again.version, 2);
    let address = &again.body["device"]["learned"][0];
    assert_eq!(
        (&address["address"], &address["age_minutes"]),
        (&"10.1.2.3".into(), &0.into())
    );
}

#[test]
fn golden_state_version_2_is_still_read_and_written() {
    let mut bench = golden_bench();
    let fresh = make(&bench.machine, tap().0).function;
    let golden = include_str!("../../../golden/virtio-net-v2.json");
    assert_golden(&mut bench.driver, fresh, golden);
}

#[test]
fn a_descriptor_that_is_not_a_tap_is_refused() {
    let file = tempfile::tempfile().unwrap();
    assert!(TapFd::from_fd(file.into()).is_err());
    assert!(TapFd::open("a-name-that-is-far-too-long").is_err());
}
