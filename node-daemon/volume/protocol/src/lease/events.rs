//! The events and commands of [`LeaseHolder`](crate::LeaseHolder).

use bascule_types::{BootTime, NodeUid, Owner};
use bascule_volume_format::Timings;

use bascule_volume_format::Rules;

/// The parameters of a lease holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseConfig {
    /// This node's UID.
    pub node: NodeUid,
    /// The volume's times, from its superblock.
    pub timings: Timings,
    /// All rules, except in a test that breaks one.
    pub rules: Rules,
}

/// A lease, as the next process takes it over: by a locked hand-over, or from the gate page after a
/// crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Held {
    /// The slot and generation of the lease.
    pub owner: Owner,
    /// The end of the lease.
    pub expiry: BootTime,
}

/// A heartbeat record in this node's slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OwnRecord {
    /// The node that wrote the record; another one's means that the slot was reassigned.
    pub node: NodeUid,
    /// The slot and generation of the record.
    pub owner: Owner,
    /// The record's sequence number.
    pub sequence: u64,
}

/// An input of the lease holder. `now` is the boot time, read before the call.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum LeaseEvent {
    /// Time has passed. At least four times per renewal interval.
    Tick { now: BootTime },
    /// The result of [`LeaseCommand::ReadOwnRecords`]: every record that could be parsed.
    OwnRecords {
        now: BootTime,
        records: Vec<OwnRecord>,
    },
    /// The read of [`LeaseCommand::ReadOwnRecords`] failed.
    ReadFailed { now: BootTime },
    /// A record was acknowledged as durable.
    Written { now: BootTime, sequence: u64 },
    /// A write ended with an error. Whether it took effect is unknown; it does not take effect later.
    WriteFailed { now: BootTime, sequence: u64 },
    /// Begin a new generation: higher than any in the slot, the slot's row and the gate page. Ignored
    /// unless the lease has lapsed.
    NewGeneration {
        now: BootTime,
        /// The slot and its new generation.
        owner: Owner,
    },
    /// Detach from the volume: every gate is closed, every submitted write has completed, and every
    /// VM is released.
    Leave { now: BootTime },
}

/// A command to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LeaseCommand {
    /// Read the records of this node's slot.
    ReadOwnRecords,
    /// Record `sequence` in the gate page, then write this record to block `sequence mod 4`.
    WriteRecord {
        /// The slot and generation to write.
        owner: Owner,
        /// The sequence number to write.
        sequence: u64,
        /// Whether this is the last record, with which the node detaches.
        detached: bool,
    },
}

/// Why a lease holder stopped. Only a new `bascule-volume` process takes a lease again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum StopReason {
    /// The slot has a record of another node, of this generation or a newer one.
    #[error("slot {} is written by another node, {}", .0.owner.slot, .0.node)]
    ForeignNode(OwnRecordFound),
    /// The slot has a record of this node in a newer generation.
    #[error("a newer process of this node writes the slot, as {}", .0.owner)]
    NewerGeneration(OwnRecordFound),
    /// The record that was acknowledged last is missing: the device lost it.
    #[error("the device lost the acknowledged heartbeat {sequence}")]
    RecordLost {
        /// The missing record's sequence number.
        sequence: u64,
    },
    /// The node detached.
    #[error("the node left the volume")]
    Left,
}

/// The writer of an unexpected record in this node's slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct OwnRecordFound {
    pub node: NodeUid,
    pub owner: Owner,
}

/// The state without its data, for logs and status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LeasePhase {
    /// No lease; only a new generation can take one.
    Lapsed,
    /// A new generation without an acknowledged record: no lease yet.
    Begun,
    /// A lease: the gate is open until its expiry.
    Held,
    /// Final.
    Stopped(StopReason),
}
