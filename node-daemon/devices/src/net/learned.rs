//! The guest's current IP addresses: those that it has claimed for its MAC address, in ARP (RFC 826)
//! or in neighbor advertisements (RFC 4861), within [`AGE_MAX`], and that no other machine has claimed
//! since.
//!
//! An address that moved away from the guest, as a virtual IP does on a failover, must not be
//! announced after a migration: the neighbours would send another machine's packets to the guest. So an
//! entry is removed when any frame claims its address for another MAC address, or when the guest has
//! not confirmed it for [`AGE_MAX`]. A guest that still has an address confirms it whenever it answers
//! an ARP request or a neighbor solicitation.
//!
//! The table is pure: times are durations since any fixed moment. [`Learned`] adds lock and clock.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::config::MacAddress;

/// The table of an interface as its device thread and its handle share it.
#[derive(Debug)]
pub(super) struct Learned {
    table: Mutex<LearnedAddresses>,
    begin: Instant,
}

impl Learned {
    pub(super) fn new() -> Self {
        Self {
            table: Mutex::default(),
            begin: Instant::now(),
        }
    }

    /// Learns from a frame, or forgets by it.
    pub(super) fn observe(&self, mac: MacAddress, sender: Sender, frame: &[u8]) {
        if let Some(claim) = claim(frame) {
            let now = self.now();
            self.with(|table| table.apply(mac, sender, claim, now));
        }
    }

    pub(super) fn current(&self) -> Vec<GuestIp> {
        self.with(|table| table.current(self.now()))
    }

    pub(super) fn save(&self) -> Vec<SavedAddress> {
        self.with(|table| table.save(self.now()))
    }

    pub(super) fn restore(&self, saved: &[SavedAddress]) {
        let restored = LearnedAddresses::restored(saved, self.now());
        self.with(|table| *table = restored);
    }

    /// Later than [`AGE_MAX`], so that an address may be that old.
    fn now(&self) -> Duration {
        AGE_MAX + self.begin.elapsed()
    }

    /// Also after a panic of the device thread, which is reported elsewhere: the table is valid at any
    /// time.
    fn with<T>(&self, work: impl FnOnce(&mut LearnedAddresses) -> T) -> T {
        work(&mut self.table.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The table of one interface; the latest address first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct LearnedAddresses(Vec<Entry>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    address: GuestIp,
    confirmed_at: Duration,
}

/// An address of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct GuestIp {
    pub(super) address: IpAddr,
    /// IPv6: the guest says that it is a router. An announcement must say so too, or the neighbours
    /// stop using it as one (RFC 4861, 7.2.5).
    pub(super) router: bool,
}

/// An address in a saved state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedAddress {
    #[serde(flatten)]
    pub(super) address: GuestIp,
    /// For how long it has not been confirmed, in whole minutes.
    pub(super) age_minutes: u32,
}

/// What a frame says: this address is at this MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    address: GuestIp,
    mac: MacAddress,
    /// Whether neighbours replace what they know by it.
    overrides: bool,
}

/// Who sent a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sender {
    Guest,
    Network,
}

impl LearnedAddresses {
    /// Applies what a frame from `sender` claims; `mac` is the guest's.
    pub(super) fn apply(&mut self, mac: MacAddress, sender: Sender, claim: Claim, now: Duration) {
        let same = |entry: &Entry| entry.address.address == claim.address.address;
        if claim.mac == mac {
            // The network knows of the guest's addresses only from the guest.
            if sender == Sender::Guest {
                self.0.retain(|entry| !same(entry));
                let entry = Entry {
                    address: claim.address,
                    confirmed_at: now,
                };
                self.0.insert(0, entry);
                self.0.truncate(ADDRESSES_MAX);
            }
        } else if claim.overrides {
            self.0.retain(|entry| !same(entry));
        }
    }

    /// The addresses to announce.
    pub(super) fn current(&self, now: Duration) -> Vec<GuestIp> {
        let young = self.0.iter().filter(|entry| entry.age(now) <= AGE_MAX);
        young.map(|entry| entry.address).collect()
    }

    /// To go with the guest.
    pub(super) fn save(&self, now: Duration) -> Vec<SavedAddress> {
        let young = self.0.iter().filter(|entry| entry.age(now) <= AGE_MAX);
        young
            .map(|entry| SavedAddress {
                address: entry.address,
                age_minutes: u32::try_from(entry.age(now).as_secs() / 60).unwrap_or(u32::MAX),
            })
            .collect()
    }

    /// The table of a guest that came; `now` is at least [`AGE_MAX`].
    pub(super) fn restored(saved: &[SavedAddress], now: Duration) -> Self {
        let entries = saved.iter().take(ADDRESSES_MAX).filter_map(|saved| {
            let age = Duration::from_secs(60 * u64::from(saved.age_minutes));
            let confirmed_at = now.checked_sub(age)?;
            (age <= AGE_MAX).then_some(Entry {
                address: saved.address,
                confirmed_at,
            })
        });
        Self(entries.collect())
    }
}

impl Entry {
    fn age(&self, now: Duration) -> Duration {
        now.saturating_sub(self.confirmed_at)
    }
}

/// What a frame (without virtio-net header) claims. Frames with a VLAN tag claim nothing: they are
/// of networks of the guest's own.
pub(super) fn claim(frame: &[u8]) -> Option<Claim> {
    match *frame.get(12..14)? {
        [0x08, 0x06] => arp_claim(frame.get(14..42)?),
        [0x86, 0xDD] => neighbor_advertisement(frame),
        _ => None,
    }
}

/// The sender of an ARP packet, request or reply. A probe has no sender address (RFC 5227, 2.1.1) and
/// claims nothing.
fn arp_claim(packet: &[u8]) -> Option<Claim> {
    if packet.get(..6)? != ETHERNET_IPV4 {
        return None;
    }
    let octets: [u8; 4] = packet.get(14..18)?.try_into().ok()?;
    let address = Ipv4Addr::from(octets);
    (!address.is_unspecified()).then_some(Claim {
        address: GuestIp {
            address: IpAddr::V4(address),
            router: false,
        },
        mac: mac_at(packet, 8)?,
        overrides: true,
    })
}

/// A neighbor advertisement (RFC 4861, 4.4), which only a sender on this link can send: its hop limit
/// is 255. The checksum is the guest's business.
fn neighbor_advertisement(frame: &[u8]) -> Option<Claim> {
    let header = frame.get(14..54)?;
    let message = frame.get(54..78)?;
    let valid = header[6] == ICMPV6 && header[7] == 255;
    if !valid || message[..2] != [NEIGHBOR_ADVERTISEMENT, 0] {
        return None;
    }
    let octets: [u8; 16] = message.get(8..24)?.try_into().ok()?;
    // The first option; without it (RFC 4861, 4.4: a solicited one may do so) the frame's sender.
    let option = frame.get(78..86).filter(|option| option[..2] == [2, 1]);
    let mac = match option {
        Some(option) => mac_at(option, 2)?,
        None => mac_at(frame, 6)?,
    };
    Some(Claim {
        address: GuestIp {
            address: IpAddr::V6(Ipv6Addr::from(octets)),
            router: message[4] & FLAG_ROUTER != 0,
        },
        mac,
        overrides: message[4] & FLAG_OVERRIDE != 0,
    })
}

fn mac_at(bytes: &[u8], at: usize) -> Option<MacAddress> {
    Some(MacAddress(bytes.get(at..at + 6)?.try_into().ok()?))
}

/// Hardware type Ethernet, protocol type IPv4, address lengths 6 and 4.
pub(super) const ETHERNET_IPV4: [u8; 6] = [0, 1, 0x08, 0, 6, 4];
pub(super) const ICMPV6: u8 = 58;
pub(super) const NEIGHBOR_ADVERTISEMENT: u8 = 136;
pub(super) const FLAG_ROUTER: u8 = 0x80;
pub(super) const FLAG_OVERRIDE: u8 = 0x20;
/// More addresses than an interface usually has; a guess.
pub(super) const ADDRESSES_MAX: usize = 16;
/// A guess: neighbours that communicate with a guest resolve its address every few minutes. An
/// address that no neighbour has resolved for this time needs no announcement of its own.
pub(super) const AGE_MAX: Duration = Duration::from_secs(20 * 60);

#[cfg(test)]
mod tests {
    use super::super::announce::announcements;
    use super::super::tap::HEADER_BYTES;
    use super::*;

    const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 1, 2, 3]);
    const OTHER: MacAddress = MacAddress([0x52, 0x54, 0, 9, 9, 9]);
    const START: Duration = Duration::from_secs(100_000);

    fn v4(last: u8) -> GuestIp {
        GuestIp {
            address: IpAddr::V4(Ipv4Addr::new(10, 0, 0, last)),
            router: false,
        }
    }

    fn v6(last: u16, router: bool) -> GuestIp {
        let address = IpAddr::V6(Ipv6Addr::new(0xFE80, 0, 0, 0, 0, 0, 0, last));
        GuestIp { address, router }
    }

    /// A frame that claims `address` for `mac`.
    fn frame(mac: MacAddress, address: GuestIp) -> Vec<u8> {
        announcements(mac, &[address]).remove(1)[HEADER_BYTES..].to_vec()
    }

    /// A table to which each frame, its sender and its time in seconds were applied.
    fn table(frames: &[(Sender, Vec<u8>, u64)]) -> LearnedAddresses {
        let mut table = LearnedAddresses::default();
        for (sender, frame, seconds) in frames {
            if let Some(claim) = claim(frame) {
                table.apply(MAC, *sender, claim, START + Duration::from_secs(*seconds));
            }
        }
        table
    }

    fn now(seconds: u64) -> Duration {
        START + Duration::from_secs(seconds)
    }

    #[test]
    fn the_latest_claims_of_the_guest_are_kept_and_bounded() {
        let (a, b) = (v4(1), v6(2, true));
        let claims = [a, b, a].map(|address| (Sender::Guest, frame(MAC, address), 0));
        assert_eq!(table(&claims).current(now(0)), [a, b]);
        let many: Vec<_> = (1..=100)
            .map(|last| (Sender::Guest, frame(MAC, v4(last)), 0))
            .collect();
        let kept = table(&many).current(now(0));
        assert_eq!((kept.len(), kept[0]), (ADDRESSES_MAX, v4(100)));
    }

    /// A virtual IP moved to another machine with gratuitous ARP; the guest migrated, and its
    /// destination took the address back.
    #[test]
    fn an_address_that_another_machine_claims_is_no_longer_the_guests() {
        for address in [v4(7), v6(7, false)] {
            let frames = [
                (Sender::Guest, frame(MAC, v4(1)), 0),
                (Sender::Guest, frame(MAC, address), 0),
                (Sender::Network, frame(OTHER, address), 5),
            ];
            assert_eq!(table(&frames).current(now(5)), [v4(1)], "{address:?}");
            // The guest takes it back.
            let again = (Sender::Guest, frame(MAC, address), 6);
            let frames = [&frames[..], &[again]].concat();
            assert_eq!(table(&frames).current(now(6)), [address, v4(1)]);
        }
    }

    #[test]
    fn an_address_that_the_guest_announces_with_another_mac_is_removed() {
        let frames = [
            (Sender::Guest, frame(MAC, v4(7)), 0),
            (Sender::Guest, frame(OTHER, v4(7)), 1),
        ];
        assert_eq!(table(&frames).current(now(1)), []);
    }

    #[test]
    fn an_anycast_advertisement_of_another_machine_changes_nothing() {
        let mut anycast = frame(OTHER, v6(7, false));
        anycast[54 + 4] &= !FLAG_OVERRIDE;
        let frames = [
            (Sender::Guest, frame(MAC, v6(7, false)), 0),
            (Sender::Network, anycast, 1),
        ];
        assert_eq!(table(&frames).current(now(1)), [v6(7, false)]);
    }

    #[test]
    fn an_address_that_was_not_confirmed_for_long_is_not_announced() {
        let frames = [(Sender::Guest, frame(MAC, v4(1)), 0)];
        let age_max = AGE_MAX.as_secs();
        assert_eq!(table(&frames).current(now(age_max)), [v4(1)]);
        assert_eq!(table(&frames).current(now(age_max + 1)), []);
        assert_eq!(table(&frames).save(now(age_max + 1)), []);
    }

    #[test]
    fn the_age_is_saved_with_the_guest() {
        let frames = [(Sender::Guest, frame(MAC, v4(1)), 0)];
        let saved = table(&frames).save(now(15 * 60 + 30));
        assert_eq!(saved[0].age_minutes, 15);
        let there = LearnedAddresses::restored(&saved, AGE_MAX);
        assert_eq!(
            there.current(AGE_MAX + Duration::from_secs(5 * 60)),
            [v4(1)]
        );
        assert_eq!(there.current(AGE_MAX + Duration::from_secs(5 * 60 + 1)), []);
    }

    #[test]
    fn a_hostile_state_makes_a_bounded_table_of_young_addresses() {
        let mut saved: Vec<SavedAddress> = (0..200)
            .map(|last| SavedAddress {
                address: v4(last),
                age_minutes: 0,
            })
            .collect();
        saved[0].age_minutes = u32::MAX;
        saved[1].age_minutes = 21;
        let table = LearnedAddresses::restored(&saved, AGE_MAX);
        assert_eq!(table.current(AGE_MAX).len(), ADDRESSES_MAX - 2);
    }

    #[test]
    fn nothing_is_learned_from_the_network_from_probes_or_from_parts_of_frames() {
        for address in [v4(1), v6(1, false)] {
            let whole = frame(MAC, address);
            assert_eq!(
                table(&[(Sender::Network, whole.clone(), 0)]).current(now(0)),
                []
            );
            for length in 0..if address.address.is_ipv4() { 42 } else { 78 } {
                assert_eq!(claim(&whole[..length]), None, "{length} bytes");
            }
        }
        assert_eq!(
            claim(&frame(
                MAC,
                GuestIp {
                    address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                    router: false,
                }
            )),
            None
        );
        let mut routed = frame(MAC, v6(1, false));
        routed[14 + 7] = 254;
        assert_eq!(claim(&routed), None, "it came through a router");
        let mut tagged = frame(MAC, v4(1));
        tagged[12..14].copy_from_slice(&[0x81, 0]);
        assert_eq!(claim(&tagged), None);
    }
}
