//! Which writes of a coordinator or candidate may still land. An error ends no write, nor does the end of
//! its process: only success does, or the reset of the node and the settle time. So this outlives the
//! process, for as long as its node runs.
//!
//! # States of a part of a slot
//! ```text
//!            submit              end (written and flushed), or withdraw (never submitted)
//!   over ─────────────► submitted ─────────────────────────────────────────────────► over
//!    ▲                   │     │ fail, or the process ended and nothing
//!    │ settle: its       │     │ proves that its request is complete
//!    │ process ended, ◄──┘     ▼
//!    │ and it is          failed: nothing writes the part
//!    └─── complete          └──── reset of the node ────► over (a candidate waits for the settle time)
//! ```
//! The driver records each step where the next process finds it: `submit` before the write begins.

use std::collections::BTreeSet;

use bascule_types::SlotId;
use bascule_volume_format::SlotPart;

use bascule_volume_format::{Rules, broken};

/// A part of a slot.
pub type Part = (SlotId, SlotPart);

/// The writes of this node, in this boot, that may still land.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct OutstandingWrites {
    submitted: BTreeSet<Part>,
    failed: BTreeSet<Part>,
}

/// What the next process knows of the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Predecessor {
    /// It ran before the node was reset.
    OfEarlierBoot,
    /// None of its requests is in flight. Whether the last one succeeded is not known.
    Complete,
    /// Its requests cannot be asked for.
    Unproved,
}

impl OutstandingWrites {
    /// As recorded: the parts with a write under way, and those with a failed one.
    #[must_use]
    pub const fn new(submitted: BTreeSet<Part>, failed: BTreeSet<Part>) -> Self {
        Self { submitted, failed }
    }

    /// A write to `part` is about to begin.
    pub fn submit(&mut self, part: Part) {
        self.submitted.insert(part);
    }

    /// Nothing was submitted after all.
    pub fn withdraw(&mut self, part: Part) {
        self.submitted.remove(&part);
    }

    /// Every submitted write was written and flushed.
    pub fn end(&mut self) {
        self.submitted.clear();
    }

    /// A submitted write, or the flush after it, failed.
    pub fn fail(&mut self) {
        self.failed.append(&mut self.submitted);
    }

    /// What of these a new process has to reckon with.
    #[must_use]
    pub fn inherit(mut self, rules: Rules, predecessor: Predecessor) -> Self {
        if broken!(rules, ForgetFailedWrites) {
            return Self::default();
        }
        match predecessor {
            Predecessor::OfEarlierBoot => return Self::default(),
            Predecessor::Complete => {}
            Predecessor::Unproved => self.fail(),
        }
        self
    }

    /// The settle time has passed since the predecessor's last request was complete.
    pub fn settle(&mut self) {
        self.submitted.clear();
    }

    /// The parts of `slot` that must not be written before the node was reset.
    #[must_use]
    pub fn barred(&self, slot: SlotId) -> BTreeSet<SlotPart> {
        let of_slot = self.failed.iter().filter(|(of, _)| *of == slot);
        of_slot.map(|(_, part)| *part).collect()
    }

    /// The parts with a write under way.
    #[must_use]
    pub const fn submitted(&self) -> &BTreeSet<Part> {
        &self.submitted
    }

    /// The parts with a failed write.
    #[must_use]
    pub const fn failed(&self) -> &BTreeSet<Part> {
        &self.failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOT: SlotId = SlotId(2);
    const LEADER: Part = (SLOT, SlotPart::Leader);
    const BLOCK: Part = (SLOT, SlotPart::Paxos(3));

    fn submitted(parts: &[Part]) -> OutstandingWrites {
        let mut writes = OutstandingWrites::default();
        for part in parts {
            writes.submit(*part);
        }
        writes
    }

    #[test]
    fn a_failed_write_is_over_only_after_a_reset() {
        let mut writes = submitted(&[LEADER, BLOCK]);
        writes.fail();
        writes.submit(LEADER);
        writes.end();
        writes.settle();
        let both = BTreeSet::from([SlotPart::Leader, SlotPart::Paxos(3)]);
        assert_eq!(writes.barred(SLOT), both);
        assert_eq!(writes.barred(SlotId(0)), BTreeSet::new(), "another slot");
        for same_boot in [Predecessor::Complete, Predecessor::Unproved] {
            let next = writes.clone().inherit(Rules::ENFORCED, same_boot);
            assert_eq!(next.barred(SLOT), both);
        }
        let reset = writes.inherit(Rules::ENFORCED, Predecessor::OfEarlierBoot);
        assert_eq!(reset, OutstandingWrites::default());
    }

    #[test]
    fn a_write_of_a_killed_process_is_over_after_a_proof_and_the_settle_time() {
        let writes = submitted(&[BLOCK]);
        let mut proved = writes
            .clone()
            .inherit(Rules::ENFORCED, Predecessor::Complete);
        assert_eq!(proved, writes);
        proved.settle();
        assert_eq!(proved, OutstandingWrites::default());
        let mut unproved = writes.inherit(Rules::ENFORCED, Predecessor::Unproved);
        unproved.settle();
        assert_eq!(unproved.barred(SLOT), BTreeSet::from([SlotPart::Paxos(3)]));
    }

    #[test]
    fn a_write_that_was_flushed_or_never_submitted_is_over() {
        let mut writes = submitted(&[LEADER, BLOCK]);
        writes.withdraw(LEADER);
        assert_eq!(writes, submitted(&[BLOCK]));
        writes.end();
        assert_eq!(writes, OutstandingWrites::default());
    }
}
