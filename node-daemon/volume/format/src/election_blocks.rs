//! The blocks of the coordinator's election: Disk Paxos (Gafni and Lamport, 2003) on one disk,
//! one instance per coordinator epoch, and the leader blocks that say who won.
//!
//! # Paxos blocks
//! Each slot has [`PAXOS_SUBSECTORS`] blocks. Ballot `b` of any instance is written to block
//! `(b / slots) mod 8` of its slot, so that a late write of an earlier ballot destroys no later
//! one; a block is used again only `settle` after its last writer was reset, or when that writer
//! is this very process and its write has completed. Both phases of one ballot use one block, the
//! second after the first has completed. A reader takes, of a slot's blocks, the one highest in
//! (instance, mbal, bal).
//!
//! ```text
//! offset size  field                              (header epoch: the instance)
//!     48    8  generation of the writer
//!     56    8  mbal: the highest ballot that this slot entered
//!     64    8  bal: the ballot in which `value` was accepted, 0 if none was
//!     72    2  slot of the writer
//!     74    2  value: slot
//!     76    4  zero
//!     80    8  value: generation; 0 if there is no value
//! ```
//!
//! # Leader blocks
//! One per slot, written by that slot's node alone: a late write of a deposed coordinator cannot
//! hide its successor. The coordinator is the one whose leader block has the highest epoch; whoever
//! wants to know reads all of them.
//!
//! ```text
//! offset size  field                              (header epoch: the coordinator epoch)
//!     48    8  generation of the coordinator
//!     56    2  its slot
//! ```

use bascule_types::{Generation, Owner, SlotId};
use serde::{Deserialize, Serialize};

use crate::FormatError;
use crate::envelope::{BodyReader, BodyWriter, Kind, Record};

/// Paxos blocks per slot.
pub const PAXOS_SUBSECTORS: u64 = 8;

/// One tenure of a coordinator, from 1. Orders coordinators; has nothing to do with the epoch of
/// a VM's row.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct CoordinatorEpoch(pub u64);

impl CoordinatorEpoch {
    /// The next one.
    ///
    /// # Panics
    /// When the counter would wrap.
    #[must_use]
    #[expect(clippy::panic, reason = "a wrapped counter would order old before new")]
    pub const fn next(self) -> Self {
        match self.0.checked_add(1) {
            Some(value) => Self(value),
            None => panic!("CoordinatorEpoch wrapped"),
        }
    }
}

impl std::fmt::Display for CoordinatorEpoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(&self.0, f)
    }
}

/// What a slot has promised and accepted in one election.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PaxosBlock {
    /// The election: the epoch that its winner gets.
    pub instance: CoordinatorEpoch,
    /// Who wrote this block.
    pub writer: Owner,
    /// The highest ballot that the writer entered.
    pub mbal: u64,
    /// What it accepted, if anything: the ballot and the value.
    pub accepted: Option<Accepted>,
}

/// A value that was accepted in a ballot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Accepted {
    /// The ballot.
    pub bal: u64,
    /// Who shall be the coordinator.
    pub value: Owner,
}

impl PaxosBlock {
    /// What orders the blocks of one slot.
    #[must_use]
    pub fn order(&self) -> (CoordinatorEpoch, u64, u64) {
        (self.instance, self.mbal, self.accepted.map_or(0, |a| a.bal))
    }
}

/// "I coordinate in this epoch."
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaderBlock {
    /// The tenure that this coordinator won.
    pub epoch: CoordinatorEpoch,
    /// The coordinator.
    pub coordinator: Owner,
}

impl Record for PaxosBlock {
    const KIND: Kind = Kind::Paxos;

    fn epoch(&self) -> u64 {
        self.instance.0
    }

    fn encode(&self, body: &mut BodyWriter<'_>) {
        body.u64(self.writer.generation.0);
        body.u64(self.mbal);
        body.u64(self.accepted.map_or(0, |a| a.bal));
        body.u16(self.writer.slot.0);
        body.u16(self.accepted.map_or(0, |a| a.value.slot.0));
        body.u32(0);
        body.u64(self.accepted.map_or(0, |a| a.value.generation.0));
    }

    fn parse(epoch: u64, body: &mut BodyReader<'_>) -> Result<Self, FormatError> {
        let generation = Generation(body.u64());
        let (mbal, bal) = (body.u64(), body.u64());
        let slot = SlotId(body.u16());
        let value_slot = SlotId(body.u16());
        body.u32();
        let value = Owner {
            slot: value_slot,
            generation: Generation(body.u64()),
        };
        if bal > mbal {
            return Err(FormatError::Field("bal"));
        }
        let accepted = match (bal, value.generation) {
            (0, Generation(0)) => None,
            (0, _) | (_, Generation(0)) => return Err(FormatError::Field("value")),
            _ => Some(Accepted { bal, value }),
        };
        Ok(Self {
            instance: CoordinatorEpoch(epoch),
            writer: Owner { slot, generation },
            mbal,
            accepted,
        })
    }
}

impl Record for LeaderBlock {
    const KIND: Kind = Kind::Leader;

    fn epoch(&self) -> u64 {
        self.epoch.0
    }

    fn encode(&self, body: &mut BodyWriter<'_>) {
        body.u64(self.coordinator.generation.0);
        body.u16(self.coordinator.slot.0);
    }

    fn parse(epoch: u64, body: &mut BodyReader<'_>) -> Result<Self, FormatError> {
        let generation = Generation(body.u64());
        let slot = SlotId(body.u16());
        Ok(Self {
            epoch: CoordinatorEpoch(epoch),
            coordinator: Owner { slot, generation },
        })
    }
}
