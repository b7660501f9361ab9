//! When `bascule-watchdog` pets the node's watchdog device (in the kernel's terms: sends a keepalive).
//!
//! # States
//! ```text
//!   every enlisted volume's lease is valid ──► Pet
//!   one has lapsed, or its gate page cannot be read ──► Withhold: the device resets the node when
//!                                                       its timeout has passed
//! ```
//!
//! A process that starts decides in the same way before it opens the device, because opening it,
//! setting its timeout and closing it may each pet it:
//!
//! ```text
//!   a holder has the device open ────────────────────────► Adopt: pet nothing, then decide
//!   no holder, every enlisted lease is valid ────────────► Open
//!   no holder, one has lapsed ───────────────────────────► Wait: the device, if an earlier process
//!                                                          armed it, resets the node
//! ```
//!
//! # Guarantees
//! The decision to pet is made while every enlisted lease is valid. After the earliest expiry the
//! device is petted at most once more, and then within one timeout, because it has counted since the
//! previous pet: either by a pet that was decided before the expiry and comes late because the
//! process was frozen, or by the kernel's pet when the last descriptor is closed. So the node is
//! reset at the latest two timeouts after the earliest expiry. [`timeout_fits`] checks that the safe
//! time has room for that.
//!
//! # Assumes
//! Two processes hold the device open, and they do not both end within the one timeout that follows
//! a late pet: that would add a third timeout. One of them may end at any time, any number of times.

use std::collections::BTreeSet;
use std::time::Duration;

use bascule_types::{BootTime, VolumeId};

use bascule_volume_format::Timings;

use crate::drift::Drift;
use bascule_volume_format::{Rules, broken};

/// The volumes on whose leases the watchdog depends.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Enlisted {
    rules: Rules,
    volumes: BTreeSet<VolumeId>,
}

/// Whether to pet the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// Every enlisted lease is valid.
    Pet,
    /// The lease of this volume has ended: do not pet.
    Withhold(VolumeId),
}

/// What a process that starts does about the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Start {
    /// Take the open descriptor over from the holder. That pets nothing.
    Adopt,
    /// Open the device, which arms it and may pet it.
    Open,
    /// Do not open the device before every enlisted lease is valid: the lease of this volume has ended.
    Wait(VolumeId),
}

impl Start {
    /// Decides for a process that starts. `is_held`: another process of this node holds the device
    /// open.
    #[must_use]
    pub fn decide(rules: Rules, is_held: bool, decision: Decision) -> Self {
        match decision {
            _ if is_held => Self::Adopt,
            Decision::Withhold(volume) if !broken!(rules, OpenBeforeDeciding) => Self::Wait(volume),
            Decision::Withhold(_) | Decision::Pet => Self::Open,
        }
    }
}

impl Enlisted {
    /// Without volumes: the device is always petted.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            volumes: BTreeSet::new(),
        }
    }

    /// Adds a volume, before its first writer opens. Idempotent. The volume stays enlisted when the
    /// client that enlisted it disconnects.
    #[must_use]
    pub fn enlist(mut self, volume: VolumeId) -> Self {
        self.volumes.insert(volume);
        self
    }

    /// Removes a volume whose gates are closed and whose submitted writes have completed (see
    /// [`crate::Writers`]). Idempotent.
    #[must_use]
    pub fn withdraw(mut self, volume: VolumeId) -> Self {
        self.volumes.remove(&volume);
        self
    }

    /// The volumes whose leases a pet of the watchdog requires.
    pub fn volumes(&self) -> impl Iterator<Item = VolumeId> + '_ {
        self.volumes.iter().copied()
    }

    /// Whether to pet at `now`. `expiry` returns the expiry in a volume's gate page; none if the page
    /// cannot be read.
    ///
    /// # Ordering
    /// Take `now` before the pages are read, and pet right after.
    #[must_use]
    pub fn decide(&self, now: BootTime, expiry: impl Fn(VolumeId) -> Option<BootTime>) -> Decision {
        if broken!(self.rules, PetWithoutLease) {
            return Decision::Pet;
        }
        let lapsed = |volume: &&VolumeId| expiry(**volume).is_none_or(|expiry| now >= expiry);
        match self.volumes.iter().find(lapsed) {
            Some(volume) => Decision::Withhold(*volume),
            None => Decision::Pet,
        }
    }
}

/// Whether a device with the timeout `device` resets a node within the volume's safe time: the lease
/// and two timeouts must fit W and the volume's watchdog time, and the timeout must not exceed the
/// watchdog time. If not, the node's heartbeat on this volume must say `WatchdogKind::None`.
#[must_use]
pub fn timeout_fits(rules: Rules, timings: &Timings, device: Duration) -> bool {
    // One for the device to fire after the last keepalive in time, one for a keepalive that comes late.
    let timeouts = if broken!(rules, LateKeepaliveNotCounted) {
        1
    } else {
        2
    };
    let reset_after = Drift::ASSUMED.watch_min(timings.lease + device * timeouts);
    let fits = reset_after <= timings.watch + timings.watchdog && device <= timings.watchdog;
    fits || broken!(rules, LongWatchdogTimeout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i1_a_device_whose_late_pet_would_outlast_the_safe_time_does_not_count() {
        let fits = |seconds| {
            timeout_fits(
                Rules::ENFORCED,
                &Timings::DEFAULT,
                Duration::from_secs(seconds),
            )
        };
        assert!(fits(8));
        // L + 2 · 9 s is W + 10 s exactly, which leaves nothing for clock drift.
        assert!(!fits(9) && !fits(10) && !fits(11));
    }

    const GOLD: VolumeId = VolumeId::from_bytes([1; 16]);
    const SILVER: VolumeId = VolumeId::from_bytes([2; 16]);

    fn both() -> Enlisted {
        Enlisted::new(Rules::ENFORCED).enlist(GOLD).enlist(SILVER)
    }

    fn until(gold: u64, silver: u64) -> impl Fn(VolumeId) -> Option<BootTime> {
        move |volume| Some(BootTime(if volume == GOLD { gold } else { silver }))
    }

    #[test]
    fn the_device_is_petted_only_while_every_enlisted_lease_is_valid() {
        let none = Enlisted::new(Rules::ENFORCED);
        assert_eq!(none.decide(BootTime(5), |_| None), Decision::Pet);
        assert_eq!(both().decide(BootTime(9), until(10, 10)), Decision::Pet);
        let withheld = Decision::Withhold(SILVER);
        assert_eq!(both().decide(BootTime(9), until(10, 9)), withheld);
    }

    #[test]
    fn i1_a_process_that_starts_opens_the_device_only_while_every_enlisted_lease_is_valid() {
        let start = |is_held, decision| Start::decide(Rules::ENFORCED, is_held, decision);
        assert_eq!(start(false, Decision::Pet), Start::Open);
        assert_eq!(start(false, Decision::Withhold(GOLD)), Start::Wait(GOLD));
        assert_eq!(start(true, Decision::Pet), Start::Adopt);
        assert_eq!(start(true, Decision::Withhold(GOLD)), Start::Adopt);
    }

    #[test]
    fn an_unreadable_gate_page_counts_as_a_lapsed_lease() {
        let withheld = Decision::Withhold(GOLD);
        assert_eq!(both().decide(BootTime(9), |_| None), withheld);
    }

    #[test]
    fn a_withdrawn_volume_may_lapse() {
        let gold = both().withdraw(SILVER).withdraw(SILVER);
        assert_eq!(gold.decide(BootTime(9), until(10, 9)), Decision::Pet);
        assert_eq!(gold.volumes().collect::<Vec<_>>(), [GOLD]);
    }
}
