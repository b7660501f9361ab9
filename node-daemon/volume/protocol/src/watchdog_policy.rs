//! When the owner of the node's watchdog pets it.
//!
//! ```text
//!   every enlisted volume's lease is valid ──► Pet
//!   one has lapsed, or its gate page cannot be read ──► Withhold: the node is reset when the
//!                                                       device's timeout has passed
//! ```
//!
//! # Guarantees
//! The decision to pet was made while every enlisted lease was valid. The pet itself may come late,
//! if the process is frozen in between, but not later than one timeout after that moment: the
//! device has counted on since the pet before. So the reset comes at the latest two timeouts after
//! the earliest expiry. [`timeout_fits`] says whether T_safe has room for that.

use std::collections::BTreeSet;
use std::time::Duration;

use bascule_types::{BootTime, VolumeId};

use bascule_volume_format::Timings;

use crate::drift::Drift;
use crate::rules::{Rules, broken};

/// The volumes whose lease the watchdog watches.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Enlisted {
    rules: Rules,
    volumes: BTreeSet<VolumeId>,
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// Pet the device.
    Pet,
    /// Do not: this volume's lease is over.
    Withhold(VolumeId),
}

impl Enlisted {
    /// No volumes: the device is petted.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            volumes: BTreeSet::new(),
        }
    }

    /// A volume has an open writer. Idempotent; a client that goes away changes nothing.
    #[must_use]
    pub fn enlist(mut self, volume: VolumeId) -> Self {
        self.volumes.insert(volume);
        self
    }

    /// A volume's gates are closed and every submitted write has completed (see
    /// [`crate::Writers`]). Idempotent.
    #[must_use]
    pub fn withdraw(mut self, volume: VolumeId) -> Self {
        self.volumes.remove(&volume);
        self
    }

    /// The enlisted volumes.
    pub fn volumes(&self) -> impl Iterator<Item = VolumeId> + '_ {
        self.volumes.iter().copied()
    }

    /// Whether to pet at `now`. `expiry` reads a volume's gate page: none if it cannot be read.
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

/// Whether a device with this timeout resets a node in the time that a volume's T_safe allows:
/// the lease and two timeouts must fit W and the volume's watchdog time. Else the node has no
/// watchdog as far as that volume is concerned, and its heartbeat must say so.
#[must_use]
pub fn timeout_fits(rules: Rules, timings: &Timings, device: Duration) -> bool {
    let reset_after = Drift::ASSUMED.watch_min(timings.lease + device * 2);
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
