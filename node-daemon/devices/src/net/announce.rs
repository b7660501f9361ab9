//! Announcements of a guest after a migration: a reverse ARP request (RFC 903), which needs only the
//! MAC address and makes switches learn the port, and for every address of the guest a gratuitous
//! ARP (RFC 5227, 3) or an unsolicited neighbor advertisement (RFC 4861, 7.2.6), which update the
//! caches of its neighbours.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::config::MacAddress;
use super::learned::{
    ETHERNET_IPV4, FLAG_OVERRIDE, FLAG_ROUTER, GuestIp, ICMPV6, NEIGHBOR_ADVERTISEMENT,
};
use super::tap::HEADER_BYTES;

/// The frames that announce `mac`, each with an empty virtio-net header.
pub(super) fn announcements(mac: MacAddress, addresses: &[GuestIp]) -> Vec<Vec<u8>> {
    let no_address = Ipv4Addr::UNSPECIFIED;
    let reverse = frame(
        mac,
        ETHERTYPE_RARP,
        RARP_REQUEST,
        (no_address, mac, no_address),
    );
    let each = addresses.iter().map(|guest| match guest.address {
        IpAddr::V4(address) => {
            let target = MacAddress([0; 6]);
            frame(mac, ETHERTYPE_ARP, ARP_REQUEST, (address, target, address))
        }
        IpAddr::V6(address) => advertisement(mac, address, guest.router),
    });
    std::iter::once(reverse).chain(each).collect()
}

/// An unsolicited neighbor advertisement to all nodes of the link.
fn advertisement(mac: MacAddress, address: Ipv6Addr, router: bool) -> Vec<u8> {
    let flags = FLAG_OVERRIDE | if router { FLAG_ROUTER } else { 0 };
    let mut message = vec![NEIGHBOR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    message.extend(address.octets());
    // Target link-layer address, of one unit of eight bytes.
    message.extend([2, 1]);
    message.extend(mac.0);
    let sum = checksum(address, ALL_NODES, &message).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);

    let mut bytes = vec![0; HEADER_BYTES];
    bytes.extend(ALL_NODES_MAC);
    bytes.extend(mac.0);
    bytes.extend(ETHERTYPE_IPV6);
    bytes.extend([0x60, 0, 0, 0]);
    bytes.extend(length.to_be_bytes());
    bytes.extend([ICMPV6, 255]);
    bytes.extend(address.octets());
    bytes.extend(ALL_NODES.octets());
    bytes.extend(message);
    bytes
}

/// The checksum of an ICMPv6 message of even length with its pseudo-header (RFC 8200, 8.1).
fn checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    let words = (source.octets().into_iter())
        .chain(destination.octets())
        .chain(length.to_be_bytes())
        .chain([0, 0, 0, ICMPV6])
        .chain(message.iter().copied())
        .collect::<Vec<u8>>();
    let (pairs, _) = words.as_chunks::<2>();
    let mut sum: u32 = pairs
        .iter()
        .map(|pair| u32::from(u16::from_be_bytes(*pair)))
        .sum();
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// A broadcast ARP or RARP packet (RFC 826).
fn frame(
    mac: MacAddress,
    ethertype: [u8; 2],
    operation: [u8; 2],
    (sender_ip, target_mac, target_ip): (Ipv4Addr, MacAddress, Ipv4Addr),
) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    bytes.extend([0xFF; 6]);
    bytes.extend(mac.0);
    bytes.extend(ethertype);
    bytes.extend(ETHERNET_IPV4);
    bytes.extend(operation);
    bytes.extend(mac.0);
    bytes.extend(sender_ip.octets());
    bytes.extend(target_mac.0);
    bytes.extend(target_ip.octets());
    bytes.resize(HEADER_BYTES + FRAME_BYTES_MIN, 0);
    bytes
}

const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_RARP: [u8; 2] = [0x80, 0x35];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xDD];
/// ff02::1 and its Ethernet address (RFC 2464, 7).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xFF02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ARP_REQUEST: [u8; 2] = [0, 1];
const RARP_REQUEST: [u8; 2] = [0, 3];
/// The shortest Ethernet frame without its checksum.
const FRAME_BYTES_MIN: usize = 60;

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 1, 2, 3]);

    #[test]
    fn a_reverse_arp_request_needs_no_address() {
        let frames = announcements(MAC, &[]);
        assert_eq!(frames.len(), 1);
        let frame = &frames[0][HEADER_BYTES..];
        assert_eq!(frame.len(), 60);
        assert_eq!(frame[..6], [0xFF; 6]);
        assert_eq!(frame[6..12], MAC.0);
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!(frame[22..28], MAC.0);
        assert_eq!(frame[32..38], MAC.0);
    }

    #[test]
    fn an_ipv4_address_is_announced_by_gratuitous_arp() {
        let address = Ipv4Addr::new(10, 0, 0, 1);
        let guest = GuestIp {
            address: address.into(),
            router: false,
        };
        let frames = announcements(MAC, &[guest]);
        assert_eq!(frames.len(), 2);
        let frame = &frames[1][HEADER_BYTES..];
        assert_eq!(frame[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(frame[28..32], address.octets());
        assert_eq!(frame[38..42], address.octets());
    }

    #[test]
    fn an_ipv6_address_is_announced_by_an_advertisement_with_a_right_checksum() {
        let address = "fe80::5054:ff:fe01:203".parse().unwrap();
        for (router, flags) in [(false, 0x20), (true, 0xA0)] {
            let guest = GuestIp {
                address: IpAddr::V6(address),
                router,
            };
            let frame = &announcements(MAC, &[guest])[1][HEADER_BYTES..];
            assert_eq!(frame.len(), 86);
            assert_eq!(frame[..6], [0x33, 0x33, 0, 0, 0, 1]);
            assert_eq!(frame[12..22], [0x86, 0xDD, 0x60, 0, 0, 0, 0, 32, 58, 255]);
            assert_eq!((frame[54], frame[58]), (136, flags));
            assert_eq!(frame[62..78], address.octets());
            assert_eq!(frame[80..86], MAC.0);
            // A message with its checksum sums up to nothing (RFC 1071).
            assert_eq!(checksum(address, ALL_NODES, &frame[54..]), 0);
        }
    }
}
