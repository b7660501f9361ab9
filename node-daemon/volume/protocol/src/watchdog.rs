//! When the owner of the node's watchdog pets it.
//!
//! ```text
//!   every enlisted volume's lease is valid ──► Pet
//!   one has lapsed, or its gate page cannot be read ──► Withhold: the node is reset when the
//!                                                       device's timeout has passed
//! ```
//!
//! # Guarantees
//! The last pet happened while every enlisted lease was valid, so the reset comes at the latest one
//! timeout after the earliest expiry: that is what T_safe counts on.

use std::collections::BTreeSet;

use bascule_types::{BootTime, VolumeId};

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

#[cfg(test)]
mod tests {
    use super::*;

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
