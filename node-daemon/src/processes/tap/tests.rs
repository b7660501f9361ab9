//! Taps in a network namespace of their own, with real bridges.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bascule_devices::net::Tap;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::*;
use crate::wait::wait_for;

#[test]
fn a_taps_name_fits_an_interface_name() {
    let (one, other, vm) = (NodeUid::random(), NodeUid::random(), VmUid::random());
    assert!(name(one, vm, 15).len() <= 15);
    assert_ne!(name(one, vm, 0), name(other, vm, 0));
    assert_ne!(name(one, vm, 0), name(one, vm, 1));
}

/// Two commands removed the same VM process, and the later one failed with "No such device".
#[test]
fn only_enodev_means_that_another_command_has_removed_the_tap() {
    let answer = |code: i32| {
        let mut message = rtnetlink::packet_core::ErrorMessage::default();
        message.code = std::num::NonZeroI32::new(code);
        rtnetlink::Error::NetlinkError(message)
    };
    assert!(says_gone(&answer(-19)), "ENODEV");
    assert!(!says_gone(&answer(-1)), "EPERM");
    assert!(!says_gone(&rtnetlink::Error::RequestFailed));
}

#[test]
fn a_bridge_that_does_not_exist_is_the_reason() {
    let error = ensure("bs00000000-0", "bsc-no-such-br", MAC).unwrap_err();
    assert_eq!(format!("{error:#}"), "it does not exist on this node");
}

#[test]
fn a_bridge_whose_mtu_no_tap_can_have_is_refused_with_the_range() {
    for (of_bridge, taken) in [(68, Some(68)), (1500, Some(1500)), (65_521, Some(65_521))] {
        assert_eq!(tap_mtu(of_bridge).ok(), taken);
    }
    for beyond in [0, 67, 65_522, 65_535, 65_536, u32::MAX] {
        let error = tap_mtu(beyond).unwrap_err().to_string();
        assert!(
            error.contains(&beyond.to_string()) && error.contains("68 to 65521"),
            "{error}"
        );
    }
}

/// The address of the guest's interface.
const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const OTHER_MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 4];
/// The virtio-net header in front of each frame.
const HEADER_BYTES: usize = 12;

/// A frame to everybody, of at least 60 bytes.
fn frame(source: [u8; 6], rest: &[u8]) -> Vec<u8> {
    let mut frame = [&[0xFF; 6], &source[..], rest].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

/// An ARP request or, with another type, another packet of its layout, of this sender.
fn arp(ethertype: [u8; 2], sender: [u8; 6]) -> Vec<u8> {
    let fixed = [0, 1, 8, 0, 6, 4, 0, 1];
    [
        &ethertype[..],
        &fixed,
        &sender,
        &[10, 0, 0, 1],
        &[0; 6],
        &[10, 0, 0, 2],
    ]
    .concat()
}

/// Waits until frames go from one port of the bridge to the other: the kernel makes a port forward some time after
/// its carrier came up, in a work queue (net/core/link_watch.c), and drops frames until then.
fn wait_until_connected(from: &TapFd, to: &TapFd) {
    let probe = frame(MAC, &[0x88, 0xB5, 0xFE]);
    let mut buffer = [0; 2048];
    let came = wait_for(Duration::from_secs(60), || {
        from.send(&[&[0; HEADER_BYTES][..], &probe].concat())
            .unwrap();
        while let Ok(length) = to.receive(&mut buffer) {
            if buffer[HEADER_BYTES..length] == probe {
                return Some(());
            }
        }
        None
    });
    came.expect("the bridge forwards frames");
}

/// Sends the frames and then a last one through `from`; returns those that come out of `to`.
fn passed(from: &TapFd, to: &TapFd, frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let last = frame(MAC, &[0x88, 0xB5, 0xFF]);
    for one in frames.iter().chain([&last]) {
        from.send(&[&[0; HEADER_BYTES][..], one].concat()).unwrap();
    }
    let mut passed = vec![];
    let mut buffer = [0; 2048];
    let came = wait_for(Duration::from_secs(10), || {
        while let Ok(length) = to.receive(&mut buffer) {
            let one = &buffer[HEADER_BYTES..length];
            if one == last {
                return Some(());
            }
            // The bridge has frames of its own.
            if frames.iter().any(|sent| sent == one) {
                passed.push(one.to_vec());
            }
        }
        None
    });
    came.expect("the last frame passes");
    passed
}

/// A guest could take another one's address, and with it its traffic.
#[test]
fn a_guest_sends_only_with_the_address_of_its_interface() {
    let Some(_network) = Network::enter("bsc-spoof") else {
        return;
    };
    Network::bridge("br0", 1500);
    ensure("bst-0", "br0", OTHER_MAC).unwrap();
    // Again, for a VM that starts again: the filter is replaced.
    ensure("bst-0", "br0", MAC).unwrap();
    ensure("bst-1", "br0", OTHER_MAC).unwrap();
    let (guest, neighbour) = (TapFd::open("bst-0").unwrap(), TapFd::open("bst-1").unwrap());
    wait_until_connected(&guest, &neighbour);
    let (arp_type, reverse, tagged) = ([8, 6], [0x80, 0x35], [0x81, 0, 0, 5]);
    let in_vlan = |packet: Vec<u8>| [&tagged[..], &packet].concat();
    let own = [
        frame(MAC, &[0x88, 0xB5, 1]),
        frame(MAC, &arp(arp_type, MAC)),
        frame(MAC, &arp(reverse, MAC)),
        frame(MAC, &in_vlan(arp(arp_type, MAC))),
        // The sender's address is where another protocol has anything.
        frame(MAC, &arp([0x88, 0xB5], OTHER_MAC)),
    ];
    assert_eq!(passed(&guest, &neighbour, &own), own);
    let mut truncated = frame(MAC, &arp(arp_type, MAC));
    truncated.truncate(27);
    let forged = [
        frame(OTHER_MAC, &[0x88, 0xB5, 1]),
        frame([0x52, 0x55, 0, 1, 2, 3], &[0x88, 0xB5, 2]),
        frame([0x52, 0x54, 0, 1, 3, 3], &[0x88, 0xB5, 3]),
        frame(OTHER_MAC, &arp(arp_type, MAC)),
        frame(MAC, &arp(arp_type, OTHER_MAC)),
        frame(MAC, &arp(arp_type, [0x52, 0x55, 0, 1, 2, 3])),
        frame(MAC, &arp(reverse, OTHER_MAC)),
        frame(MAC, &in_vlan(arp(arp_type, OTHER_MAC))),
        truncated,
    ];
    assert_eq!(passed(&guest, &neighbour, &forged), Vec::<Vec<u8>>::new());
}

/// A named network namespace that is removed on drop.
pub(crate) struct Network(String);

impl Network {
    /// A new namespace, which the current thread is in from now on; none without root (an error on CI).
    pub(crate) fn enter(name: &str) -> Option<Self> {
        let privileged = rustix::process::geteuid().is_root();
        if !privileged || !Path::new("/dev/net/tun").exists() {
            assert!(
                std::env::var_os("CI").is_none(),
                "CI needs root and /dev/net/tun"
            );
            eprintln!("skipped: needs root and /dev/net/tun");
            return None;
        }
        let network = Self(format!("{name}-{}", std::process::id()));
        ip(&format!("netns add {}", network.0));
        let namespace = File::open(Path::new("/run/netns").join(&network.0)).unwrap();
        let kind = Some(LinkNameSpaceType::Network);
        move_into_link_name_space(namespace.as_fd(), kind).unwrap();
        Some(network)
    }

    /// A bridge with a port of this MTU, as a network card would be.
    pub(crate) fn bridge(name: &str, mtu: u32) {
        ip(&format!("link add {name} type bridge"));
        ip(&format!(
            "link add {name}-p mtu {mtu} type veth peer name {name}-q mtu {mtu}"
        ));
        ip(&format!("link set {name}-p address 52:54:00:00:00:01"));
        ip(&format!("link set {name}-p master {name}"));
        ip(&format!("link set {name} up"));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        ip(&format!("netns del {}", self.0));
    }
}

pub(crate) fn ip(arguments: &str) -> String {
    let ip = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&ip.stderr);
    assert!(ip.status.success(), "ip {arguments}: {error}");
    String::from_utf8(ip.stdout).unwrap()
}

/// The MTU and the address of an interface.
fn shown(name: &str) -> (u32, String) {
    let text = ip(&format!("link show {name}"));
    let after = |word: &str| {
        let mut words = text.split_whitespace();
        words.find(|w| *w == word);
        words.next().unwrap().to_owned()
    };
    (after("mtu").parse().unwrap(), after("link/ether"))
}

/// A tap with its 1500 bytes joined a bridge with jumbo frames, and the whole bridge fell to 1500.
#[test]
fn a_tap_takes_the_bridges_mtu_and_the_bridge_keeps_mtu_and_address() {
    let Some(_network) = Network::enter("bsc-mtu") else {
        return;
    };
    for mtu in [68, 576, 1280, 1450, 1500, 9000, 65_521] {
        let bridge = format!("br{mtu}");
        Network::bridge(&bridge, mtu);
        let before = shown(&bridge);
        assert_eq!(before.0, mtu, "a bridge takes the MTU of its first port");
        for index in [0, 1] {
            let tap = format!("bst{mtu}-{index}");
            for _again in 0..2 {
                assert_eq!(u32::from(ensure(&tap, &bridge, MAC).unwrap()), mtu);
                assert_eq!(shown(&bridge), before);
            }
            let (of_tap, address) = shown(&tap);
            assert_eq!(of_tap, mtu);
            assert!(address.starts_with("fe:ff:"), "{address}");
        }
        assert_ne!(shown(&format!("bst{mtu}-0")), shown(&format!("bst{mtu}-1")));
    }
}

/// A guest's MTU must not change while it runs (virtio 1.2, 5.1.4.1), and so its tap's does not either.
#[test]
fn a_bridges_new_mtu_reaches_a_tap_at_the_next_start_and_no_tap_undoes_it() {
    let Some(_network) = Network::enter("bsc-newmtu") else {
        return;
    };
    Network::bridge("br0", 1500);
    ensure("bst-0", "br0", MAC).unwrap();
    // As the documentation says: on the network card alone it would not reach a bridge with taps.
    ip("link set br0-p mtu 9000");
    assert_eq!(shown("br0").0, 1500);
    ip("link set br0 mtu 9000");
    assert_eq!((shown("br0").0, shown("bst-0").0), (9000, 1500));
    // Another guest starts.
    assert_eq!(ensure("bst-1", "br0", MAC).unwrap(), 9000);
    assert_eq!((shown("br0").0, shown("bst-0").0), (9000, 1500));
    // The first one starts again: its tap is new, or, after a daemon that ended in the middle, an old one.
    assert_eq!(ensure("bst-0", "br0", MAC).unwrap(), 9000);
    assert_eq!((shown("br0").0, shown("bst-0").0), (9000, 9000));
    // Back: a smaller MTU.
    ip("link set br0 mtu 1500");
    assert_eq!((shown("br0").0, shown("bst-0").0), (1500, 9000));
    assert_eq!(ensure("bst-1", "br0", MAC).unwrap(), 1500);
    assert_eq!((shown("br0").0, shown("bst-0").0), (1500, 9000));
}

#[test]
fn a_bridge_with_a_larger_mtu_than_a_tap_can_have_is_left_alone() {
    let Some(_network) = Network::enter("bsc-large") else {
        return;
    };
    Network::bridge("br0", 65_535);
    let error = ensure("bst-0", "br0", MAC).unwrap_err().to_string();
    assert!(error.contains("its MTU is 65535 bytes"), "{error}");
    assert_eq!(shown("br0").0, 65_535);
    assert!(!ip("link show").contains("bst-0"));
}

#[test]
fn all_taps_of_a_vm_are_removed_and_those_of_another_vm_stay() {
    let Some(_network) = Network::enter("bsc-taps") else {
        return;
    };
    Network::bridge("br0", 1500);
    let (node, one, other) = (NodeUid::random(), VmUid::random(), VmUid::random());
    for (vm, index) in [(one, 0), (one, 1), (one, 12), (other, 0)] {
        ensure(&name(node, vm, index), "br0", MAC).unwrap();
    }
    remove_all(node, one).unwrap();
    let left = ip("link show");
    assert!(!left.contains(&prefix(node, one)), "{left}");
    assert!(left.contains(&name(node, other, 0)), "{left}");
    remove_all(node, one).unwrap();
}
