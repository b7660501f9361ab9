//! The on-disk format of a SharedVolume, version 1: its bytes, its metadata and the rules by which
//! the metadata changes. Pure but for [`BlockStore`]; shared by `bascule-volume`, the offline
//! checker and the protocol's models. It must not know sockets, threads, clocks or Kubernetes.
//!
//! # Assumes
//! - One aligned logical block is written atomically. A record is 512 bytes, sealed with a
//!   checksum, in a 4096-byte block of its own; so 512-byte and 4Kn devices both qualify. Nothing
//!   larger is ever assumed to be atomic.
//! - Each submitted write takes effect at most once. A living initiator's write may land
//!   arbitrarily late; once its initiator was reset, or its reservation was preempted and aborted,
//!   a write lands within `settle` (in the superblock) or never. `settle` is part of every fence
//!   proof and of every reuse of a slot, a Paxos block or a metadata area.
//! - A write that was flushed survives. One that was not may be lost, alone or with others.
//! - No compare-and-write is required. Every block has one writer: a slot's heartbeats, Paxos
//!   blocks, leader block and metadata areas are written by that slot's holder alone. (A saved
//!   state or a disk is written by its owner.)
//!
//! # Versions
//! The superblock has a format version and three sets of feature flags: who does not know a compat
//! flag may ignore it, an ro-compat flag forbids writing, an incompat flag forbids everything. Each
//! kind of block has a version of its own in the envelope. A flag is raised only when every
//! attached node supports it.
//!
//! # Byte tables
//! Envelope: [`Place`] and [`seal`] · superblock: [`Superblock`] · where everything lies:
//! [`FormatRequest`] · heartbeats: [`HeartbeatRecord`] · Paxos and leader blocks: [`PaxosBlock`],
//! [`LeaderBlock`] · checkpoints and journal: [`CheckpointHead`], [`JournalBlock`] · rows:
//! [`MetaRecord`]. Each table heads the module that implements it, with offsets from the start of
//! the 512-byte record.
//!
//! # Space
//! Disks and saved states take whole extents from one region. A new extent holds whatever its last
//! user left: a new disk is `importing` until its importer has written or zeroed all of it, so that
//! it reads as zeroes or as its image, never as somebody else's data. A saved state is never read
//! beyond the length that its row gives.
//!
//! Read next: `log` (recovery and the coordinator's journal), then `metadata` (what is decided).
#![forbid(unsafe_code)]

pub mod area_blocks;
mod block_store;
mod create_and_open;
pub mod election_blocks;
pub mod envelope;
mod extent_allocator;
pub mod heartbeat;
pub mod metadata;
pub mod metadata_log;
pub mod metadata_records;
mod offline_check;
pub mod superblock;
pub mod timing;
pub mod volume_layout;

pub use area_blocks::{CheckpointHead, CheckpointId, CheckpointRow, JournalBlock};
pub use block_store::{BlockStore, MemStore};
pub use create_and_open::{MakeError, OpenError, make_volume, read_copy, read_superblock};
pub use election_blocks::{Accepted, CoordinatorEpoch, LeaderBlock, PAXOS_SUBSECTORS, PaxosBlock};
pub use envelope::{
    BLOCK_BYTES, BODY_BYTES, BodyReader, BodyWriter, FormatError, Kind, Place, RECORD_BYTES,
    Record, open, seal, seal_block,
};
pub use heartbeat::{ADDRESS_BYTES_MAX, HEARTBEAT_RECORDS, HeartbeatRecord, WatchdogKind};
pub use metadata::{Context, Contradiction, Decision, Metadata, Requester, Witness};
pub use metadata_log::{GROUP_MAX, Log, LogError, Recovered, recover};
pub use metadata_records::{MetaRecord, RUNS_MAX, SlotRow};
pub use offline_check::{Finding, Report, Severity, check_volume};
pub use superblock::{
    FORMAT_VERSION, FeatureFlags, Fencing, FencingPolicy, INCOMPAT_KNOWN, RO_COMPAT_KNOWN, Region,
    RegionKind, SLOTS_MAX, SUPERBLOCK_LBAS, Superblock,
};
pub use timing::{RHO_INVERSE, TimingError, Timings};
pub use volume_layout::{
    Area, AreaId, BLOCK_BYTES_U64, FormatRequest, LayoutError, RECORDS_PER_BLOCK,
};
