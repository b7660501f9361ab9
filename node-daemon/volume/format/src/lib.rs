//! The on-disk format of a SharedVolume, version 2: its bytes, its metadata, and the rules by which
//! the metadata changes. `bascule-volume`, the offline checker and the protocol's models share this
//! crate. It does I/O only through [`BlockStore`] and must not know sockets, threads, clocks or
//! Kubernetes.
//!
//! # Constraints
//! - **Atomic unit.** One aligned logical block is written atomically, nothing larger. A record is
//!   512 bytes, sealed with a checksum, and starts a 4096-byte block of its own; so devices with 512
//!   and with 4096-byte (4Kn) logical blocks both qualify. (Checkpoint rows and the records of a journal
//!   group lie eight to a block. Rows count only once the head that carries their checksum is durable, a
//!   group only when all of its records can be read.)
//! - **At most once, possibly late.** Each submitted write takes effect at most once. As long as
//!   its initiator lives, a write may land arbitrarily late, also after it was reported as failed.
//!   Once the initiator was reset, or its reservation was preempted and aborted, the write lands
//!   within the settle time (in the superblock) or never. The settle time is part of every fence
//!   proof and of every reuse of a slot, a Paxos block or a metadata area.
//! - **Durability.** A write that was flushed survives a power loss. A completed write that was not
//!   flushed may be lost, alone or with others, in any order.
//! - **No compare-and-write.** The format needs none, because every block has one writer.
//!
//! # Regions: position, writer, readers
//! An LBA counts 4096-byte blocks from the start of the device. The superblock holds the position
//! of every region; [`FormatRequest`] computes it once, when the volume is formatted.
//!
//! | region | blocks | contents | writer | readers |
//! |---|---|---|---|---|
//! | superblock | LBA 0, and the first of the last MiB | [`Superblock`]; [`UnfinishedFormat`] until it is written | `format`; [`rewrite_superblock`] | every node, before anything else |
//! | heartbeats | 4 per slot, from LBA 256 | [`HeartbeatRecord`] | the slot's node | every node, at each poll interval |
//! | paxos | 8 per slot | [`PaxosBlock`] | the slot's node | candidates of an election |
//! | leaders | 1 per slot | [`LeaderBlock`] | the slot's node, when it wins an election | every node; the coordinator before each answer |
//! | areas | 2 metadata areas per slot, 64 to 24,576 blocks each | [`CheckpointHead`], [`CheckpointRow`], [`JournalBlock`] | the slot's node, while it is the coordinator | every node that needs the rows |
//! | mailbox | 16 per slot | reserved, zero | none yet | none yet |
//! | references | 8 bytes per extent | reserved, zero | none yet | none yet |
//! | extents | the rest up to the last MiB, in whole extents | disks, saved states of VMs | the owner or the importer that the row names | the owner |
//!
//! # Records
//! Every metadata record has the same 48-byte header: magic, kind, checksum, volume id, its own
//! address, epoch ([`envelope`]). The byte table of each kind heads its module; offsets count from the start of the
//! 512-byte record, and all integers are little-endian. A reader accepts a record only
//! if checksum, kind, volume id and address match.
//!
//! | kind | record | byte table in | the header's epoch is |
//! |---|---|---|---|
//! | 1 | [`Superblock`] | [`superblock`] | its revision |
//! | 2 | [`HeartbeatRecord`] | [`heartbeat`] | the generation |
//! | 3 | [`PaxosBlock`] | [`election_blocks`] | the election, which is the epoch of its winner |
//! | 4 | [`LeaderBlock`] | [`election_blocks`] | the coordinator epoch |
//! | 5 | [`CheckpointHead`] | [`area_blocks`] | the coordinator epoch |
//! | 6 | [`CheckpointRow`] | [`area_blocks`]; its row in [`metadata_records`] | the coordinator epoch |
//! | 7 | [`JournalBlock`] | [`area_blocks`]; its row in [`metadata_records`] | the coordinator epoch |
//! | 8 | [`UnfinishedFormat`] | [`unfinished_format`] | 0 |
//!
//! # Versions
//! The superblock has a format version and a set of [`features`]. A reader that does not know a ro-compat one must
//! not write; one that does not know an incompat one must not use the volume at all. The header of each
//! record has the version of its kind. A feature is raised only when every node that has joined supports it.
//!
//! # Extents
//! Disks and saved states take whole extents. A newly allocated extent holds the data of its last
//! user. Therefore a new disk is `importing`, and cannot be opened, until its importer has written
//! or zeroed all of it; and a saved state is never read beyond the length that its row gives.
//!
//! Read next: [`metadata_log`] (the coordinator's journal), [`recovery`], then [`metadata`] (the
//! decisions).
#![forbid(unsafe_code)]

pub mod area_blocks;
mod block_store;
mod create;
mod damage;
pub mod election_blocks;
pub mod envelope;
mod extent_allocator;
pub mod features;
pub mod follower;
pub mod heartbeat;
pub mod metadata;
pub mod metadata_log;
pub mod metadata_records;
mod offline_check;
pub mod recovery;
mod repair;
mod rules;
pub mod superblock;
pub mod superblock_copies;
pub mod timing;
pub mod unfinished_format;
pub mod volume_layout;

pub use area_blocks::{CheckpointHead, CheckpointId, CheckpointRow, JournalBlock};
pub use block_store::{BlockStore, MemStore};
pub use create::{MakeError, make_volume};
pub use damage::{DamagedLeader, Leaders, Obsolete, read_leaders};
pub use election_blocks::{Accepted, CoordinatorEpoch, LeaderBlock, PAXOS_SUBSECTORS, PaxosBlock};
pub use envelope::{
    BLOCK_BYTES, BODY_BYTES, BodyReader, BodyWriter, FormatError, Kind, Place, RECORD_BYTES,
    Record, open, seal, seal_block,
};
pub use features::{Features, UnknownFeatures};
pub use follower::Follower;
pub use heartbeat::{ADDRESS_BYTES_MAX, HEARTBEAT_RECORDS, HeartbeatRecord, WatchdogKind};
pub use metadata::{
    Context, Contradiction, DECISION_MAX, Decision, Metadata, Overview, Requester, Witness,
};
pub use metadata_log::{Log, starting_half};
pub use metadata_records::{MetaRecord, RUNS_MAX, SlotRow};
pub use offline_check::{Finding, Report, Severity, check_volume};
pub use recovery::{GROUP_MAX, LogError, Recovered, recover};
pub use repair::{Repair, RepairStep, Repaired, plan_repair};
#[cfg(feature = "fault-injection")]
pub use rules::Mutation;
pub use rules::Rules;
pub use superblock::{
    FIRST_COPY, FORMAT_VERSION, Fencing, FencingPolicy, Region, RegionKind, SLOTS_MAX, Superblock,
    last_copy,
};
pub use superblock_copies::{
    Copies, CopyFault, OpenError, RewriteError, StaleCopy, read_copies, read_superblock,
    rewrite_superblock,
};
pub use timing::{RHO_INVERSE, TimingError, Timings};
pub use unfinished_format::{UnfinishedFormat, find_unfinished_format};
pub use volume_layout::{
    Area, AreaId, BLOCK_BYTES_U64, FormatRequest, LayoutError, RECORDS_PER_BLOCK, SlotPart,
};
