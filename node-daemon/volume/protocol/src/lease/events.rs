//! What goes into the lease machine and what comes out of it.

use bascule_types::{BootTime, NodeUid, Owner};
use bascule_volume_format::Timings;

use crate::rules::Rules;

/// What a lease needs to know for its whole life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseConfig {
    /// This node.
    pub node: NodeUid,
    /// The volume's times, from its superblock.
    pub timings: Timings,
    /// The rules in force.
    pub rules: Rules,
}

/// A lease as it goes from one process to the next: by a locked hand-over, or from the gate page
/// after a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Held {
    /// Slot and generation.
    pub owner: Owner,
    /// When the lease ends.
    pub expiry: BootTime,
}

/// A record that lies in the own slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OwnRecord {
    /// Who wrote it.
    pub node: NodeUid,
    /// Under which slot and generation.
    pub owner: Owner,
    /// Its sequence number.
    pub sequence: u64,
}

/// What happened. `now` is always taken before the event is handed over.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LeaseEvent {
    /// Time has passed; call at least four times per renewal interval.
    Tick {
        /// The moment.
        now: BootTime,
    },
    /// The read of the own slot that [`LeaseCommand::ReadOwnRecords`] asked for: every record that
    /// could be parsed.
    OwnRecords {
        /// The moment.
        now: BootTime,
        /// The records.
        records: Vec<OwnRecord>,
    },
    /// That read failed.
    ReadFailed {
        /// The moment.
        now: BootTime,
    },
    /// A record was acknowledged as durable.
    Written {
        /// The moment.
        now: BootTime,
        /// Its sequence number.
        sequence: u64,
    },
    /// A write ended with an error: whether it took effect is unknown, and it will not any more.
    WriteFailed {
        /// The moment.
        now: BootTime,
        /// Its sequence number.
        sequence: u64,
    },
    /// Begin a new generation, higher than any in the own slot, its row and the gate page. Heeded
    /// only while lapsed.
    NewGeneration {
        /// The moment.
        now: BootTime,
        /// The slot and its new generation.
        owner: Owner,
    },
    /// Every gate is closed, every submitted write has completed, every row is released: leave.
    Leave {
        /// The moment.
        now: BootTime,
    },
}

/// What the driver must do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LeaseCommand {
    /// Read the own slot's records.
    ReadOwnRecords,
    /// Record `sequence` in the gate page, then write this record to block `sequence mod 4`.
    WriteRecord {
        /// Slot and generation.
        owner: Owner,
        /// The number.
        sequence: u64,
        /// Whether it is the last one: the node leaves.
        detached: bool,
    },
}

/// Why a holder stopped for good. Only a new start of `bascule-volume` goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum StopReason {
    /// Another node writes this slot.
    #[error("slot {} is written by another node, {}", .0.owner.slot, .0.node)]
    ForeignNode(OwnRecordFound),
    /// A newer generation of this node writes the slot.
    #[error("a newer process of this node writes the slot, as {}", .0.owner)]
    NewerGeneration(OwnRecordFound),
    /// The record that was acknowledged is not there: the device lost it.
    #[error("the device lost the acknowledged heartbeat {sequence}")]
    RecordLost {
        /// Its number.
        sequence: u64,
    },
    /// The node left in order.
    #[error("the node left the volume")]
    Left,
}

/// Who was found in the own slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OwnRecordFound {
    /// The node.
    pub node: NodeUid,
    /// Its slot and generation.
    pub owner: Owner,
}

/// The state without its data, for logs and status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LeasePhase {
    /// No lease: a new generation is needed.
    Lapsed,
    /// A generation, and no acknowledged record of it yet.
    Begun,
    /// A lease.
    Held,
    /// Stopped for good.
    Stopped(StopReason),
}
