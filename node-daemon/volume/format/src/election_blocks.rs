//! The blocks of the coordinator's election: the Paxos blocks of Disk Paxos (Gafni and Lamport, 2003)
//! on one disk, one instance per coordinator epoch, and the leader blocks that record the winners.
//! Only the slot's node writes its blocks; every candidate reads all of them.
//!
//! # Paxos blocks
//! Each slot has [`PAXOS_SUBSECTORS`] blocks. Ballot `b` of any instance is written to block
//! `(b / slots) mod 8` of its slot, so that a late write of an earlier ballot does not destroy a later
//! one. A block is reused only by the process that wrote it last, after that write has completed, or
//! one settle time after that process's node was reset. Both phases of a ballot use the same block,
//! the second after the first has completed. The newest block of a slot is the one that is highest
//! in (instance, mbal, bal).
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
//! One per slot: a late write of a deposed coordinator cannot overwrite its successor's block. The
//! coordinator is the one whose leader block has the highest epoch; to find it, read all of them.
//!
//! ```text
//! offset size  field                              (header epoch: the coordinator epoch)
//!     48    8  generation of the coordinator
//!     56    2  slot of the coordinator
//! ```

use bascule_types::{Generation, Owner, SlotId};
use serde::{Deserialize, Serialize};

use crate::envelope::{BodyReader, BodyWriter, FormatError, Kind, Record};

/// Paxos blocks per slot.
pub const PAXOS_SUBSECTORS: u64 = 8;

/// The number of a coordinator's term, from 1; rises with every election that is won. Independent of
/// the epoch of a VM's ownership.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct CoordinatorEpoch(pub u64);

impl CoordinatorEpoch {
    /// This number plus one.
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

/// What a slot has promised and accepted in one instance of Disk Paxos.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PaxosBlock {
    /// The instance: the epoch that its winner gets.
    pub instance: CoordinatorEpoch,
    /// The slot and generation that wrote the block.
    pub writer: Owner,
    /// The highest ballot that the writer entered.
    pub mbal: u64,
    /// The value that the writer accepted last, and in which ballot.
    pub accepted: Option<Accepted>,
}

/// A value that was accepted in a ballot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Accepted {
    /// The ballot, at most `mbal`.
    pub bal: u64,
    pub value: Owner,
}

impl PaxosBlock {
    /// Orders the blocks of one slot.
    #[must_use]
    pub fn order(&self) -> (CoordinatorEpoch, u64, u64) {
        (self.instance, self.mbal, self.accepted.map_or(0, |a| a.bal))
    }
}

/// The record of a won election.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaderBlock {
    /// The epoch that the coordinator won.
    pub epoch: CoordinatorEpoch,
    /// The winner's slot and generation.
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
