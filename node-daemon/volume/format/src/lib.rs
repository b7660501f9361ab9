//! The on-disk format of a SharedVolume, version 1.

mod block;
pub mod change;
mod election;
mod heartbeat;
mod timing;

pub use block::{
    BLOCK_BYTES, BODY_BYTES, BodyReader, BodyWriter, FormatError, Kind, Place, RECORD_BYTES,
    Record, open, seal, seal_block,
};
pub use election::{Accepted, CoordinatorEpoch, LeaderBlock, PAXOS_SUBSECTORS, PaxosBlock};
pub use heartbeat::{ADDRESS_BYTES_MAX, HEARTBEAT_RECORDS, HeartbeatRecord, WatchdogKind};
pub use timing::{RHO_INVERSE, TimingError, Timings};
