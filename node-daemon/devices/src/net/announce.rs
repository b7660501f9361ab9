//! Announcements of a guest after a migration: a reverse ARP request (RFC 903), which needs only the
//! MAC address and makes switches learn the port, and a gratuitous ARP for every address learned from
//! the guest, which updates the ARP caches of its neighbours (RFC 5227, 3).

use std::net::Ipv4Addr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::config::MacAddress;
use super::tap::HEADER_BYTES;

/// IPv4 addresses of the guest, learned from the ARP packets that it sends, the latest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct LearnedAddresses(Vec<Ipv4Addr>);

impl LearnedAddresses {
    pub(super) fn new(mut addresses: Vec<Ipv4Addr>) -> Self {
        addresses.truncate(ADDRESSES_MAX);
        Self(addresses)
    }

    pub(super) fn as_slice(&self) -> &[Ipv4Addr] {
        &self.0
    }

    /// Learns from a frame (without virtio-net header) that the guest sent.
    pub(super) fn observe(&mut self, mac: MacAddress, frame: &[u8]) {
        let Some(sender) = arp_sender(mac, frame) else {
            return;
        };
        if self.0.first() != Some(&sender) {
            self.0.retain(|address| *address != sender);
            self.0.insert(0, sender);
            self.0.truncate(ADDRESSES_MAX);
        }
    }
}

/// Locks the addresses, also after a panic of the device thread, which is reported elsewhere: they
/// are a valid list at any time.
pub(super) fn lock(learned: &Mutex<LearnedAddresses>) -> MutexGuard<'_, LearnedAddresses> {
    learned.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The frames that announce `mac`, each with an empty virtio-net header.
pub(super) fn announcements(mac: MacAddress, addresses: &[Ipv4Addr]) -> Vec<Vec<u8>> {
    let no_address = Ipv4Addr::UNSPECIFIED;
    let reverse = frame(
        mac,
        ETHERTYPE_RARP,
        RARP_REQUEST,
        (no_address, mac, no_address),
    );
    let gratuitous = addresses.iter().map(|&address| {
        let target = MacAddress([0; 6]);
        frame(mac, ETHERTYPE_ARP, ARP_REQUEST, (address, target, address))
    });
    std::iter::once(reverse).chain(gratuitous).collect()
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

/// The sender protocol address of an ARP packet whose sender is the guest itself.
fn arp_sender(mac: MacAddress, frame: &[u8]) -> Option<Ipv4Addr> {
    let packet = frame.get(14..42)?;
    let is_arp = frame[12..14] == ETHERTYPE_ARP && packet[..6] == ETHERNET_IPV4;
    if !is_arp || packet[8..14] != mac.0 {
        return None;
    }
    let octets: [u8; 4] = packet[14..18].try_into().ok()?;
    let sender = Ipv4Addr::from(octets);
    // An ARP probe has no sender address (RFC 5227, 2.1.1).
    (!sender.is_unspecified()).then_some(sender)
}

const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_RARP: [u8; 2] = [0x80, 0x35];
/// Hardware type Ethernet, protocol type IPv4, address lengths 6 and 4.
const ETHERNET_IPV4: [u8; 6] = [0, 1, 0x08, 0, 6, 4];
const ARP_REQUEST: [u8; 2] = [0, 1];
const RARP_REQUEST: [u8; 2] = [0, 3];
/// The shortest Ethernet frame without its checksum.
const FRAME_BYTES_MIN: usize = 60;
/// More addresses than an interface usually has; a guess.
const ADDRESSES_MAX: usize = 8;

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
    fn addresses_are_learned_from_arp_and_announced() {
        let mut learned = LearnedAddresses::default();
        let [a, b] = [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)];
        for address in [a, b, a] {
            let sent = &announcements(MAC, &[address])[1][HEADER_BYTES..];
            learned.observe(MAC, sent);
        }
        assert_eq!(learned.as_slice(), [a, b]);
        let frames = announcements(MAC, learned.as_slice());
        assert_eq!(frames.len(), 3);
        assert_eq!(frames[1][HEADER_BYTES + 28..][..4], a.octets());
        assert_eq!(frames[1][HEADER_BYTES + 38..][..4], a.octets());
    }

    #[test]
    fn nothing_is_learned_from_other_senders_probes_or_truncated_frames() {
        let mut learned = LearnedAddresses::default();
        let sent = announcements(MAC, &[Ipv4Addr::new(10, 0, 0, 1)]);
        let sent = &sent[1][HEADER_BYTES..];
        learned.observe(MacAddress([1; 6]), sent);
        for length in 0..42 {
            learned.observe(MAC, &sent[..length]);
        }
        let probe = announcements(MAC, &[Ipv4Addr::UNSPECIFIED]);
        learned.observe(MAC, &probe[1][HEADER_BYTES..]);
        learned.observe(MAC, &announcements(MAC, &[])[0][HEADER_BYTES..]);
        assert_eq!(learned, LearnedAddresses::default());
    }
}
