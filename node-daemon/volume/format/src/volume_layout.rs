//! Where everything lies: computed once by `format`, and afterwards read from the superblock.
//!
//! ```text
//! LBA 0     superblock, first copy          LBA 255   superblock, second copy
//! LBA 256   heartbeats, paxos, leaders, metadata areas (two per slot), mailbox, references
//! then, from the next multiple of the extent size: extents to the end
//! ```
//!
//! # Metadata areas
//! Each slot has two areas and writes only those, so that a deposed coordinator's late write hits
//! nothing that its successor uses. An area is one head block, then blocks for checkpoint rows
//! (eight 512-byte records each), then a quarter of the area for the journal.

use bascule_types::{ClusterId, Lba, SlotId, VolumeId};

use crate::election_blocks::PAXOS_SUBSECTORS;
use crate::envelope::{BLOCK_BYTES, Place, RECORD_BYTES};
use crate::heartbeat::HEARTBEAT_RECORDS;
use crate::superblock::{
    FeatureFlags, Fencing, FencingPolicy, Region, RegionKind, SLOTS_MAX, Superblock,
};
use crate::timing::{TimingError, Timings};

/// What `format` is asked for.
#[derive(Clone, Debug)]
pub struct FormatRequest {
    /// The new volume's identity.
    pub volume: VolumeId,
    /// The cluster that it is bound to.
    pub cluster: ClusterId,
    /// How a silent node's end is proved.
    pub fencing: Fencing,
    /// What counts beyond that.
    pub policy: FencingPolicy,
    /// The times.
    pub timings: Timings,
    /// How many nodes can attach it.
    pub slot_count: u16,
    /// Extent size in MiB.
    pub extent_mib: u32,
    /// The device's size in bytes.
    pub device_bytes: u64,
}

/// Why a volume cannot be laid out as asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The device is too small.
    #[error("the device has {found} bytes; this layout needs at least {needed}")]
    TooSmall {
        /// Its size in bytes.
        found: u64,
        /// What is needed, in bytes.
        needed: u64,
    },
    /// The slot count is zero or too high.
    #[error("the slot count must be 1 to 64")]
    SlotCount,
    /// The extent size is zero or too high.
    #[error("the extent size must be 1 to 1024 MiB")]
    ExtentSize,
    /// The times are not safe.
    #[error("the timing is not safe")]
    Timing(#[from] TimingError),
    /// The fencing mode does not exist yet.
    #[error("fencing PersistentReservation is not supported yet; use Watchdog or LeaseOnly")]
    NotSupported,
}

impl FormatRequest {
    /// The superblock of the volume that was asked for.
    ///
    /// # Errors
    /// [`LayoutError`] says what does not fit.
    pub fn lay_out(&self) -> Result<Superblock, LayoutError> {
        self.timings.validate()?;
        if self.slot_count == 0 || self.slot_count > SLOTS_MAX {
            return Err(LayoutError::SlotCount);
        }
        if self.extent_mib == 0 || self.extent_mib > 1024 {
            return Err(LayoutError::ExtentSize);
        }
        if self.fencing == Fencing::PersistentReservation {
            return Err(LayoutError::NotSupported);
        }
        let blocks = self.device_bytes / BLOCK_BYTES_U64;
        let regions = self.regions(blocks)?;
        Ok(Superblock {
            volume: self.volume,
            revision: 1,
            flags: FeatureFlags::default(),
            cluster: self.cluster,
            fencing: self.fencing,
            policy: self.policy,
            slot_count: self.slot_count,
            extent_mib: self.extent_mib,
            blocks,
            timings: self.timings,
            regions,
        })
    }

    fn regions(&self, blocks: u64) -> Result<Vec<Region>, LayoutError> {
        let slots = u64::from(self.slot_count);
        let extent_blocks = u64::from(self.extent_mib) * BLOCKS_PER_MIB;
        let area = (blocks / METADATA_SHARE / (2 * slots)).clamp(AREA_MIN, AREA_MAX) / 16 * 16;
        let sizes = [
            (RegionKind::Heartbeats, slots * HEARTBEAT_RECORDS),
            (RegionKind::Paxos, slots * PAXOS_SUBSECTORS),
            (RegionKind::Leaders, slots),
            (RegionKind::Areas, slots * 2 * area),
            (RegionKind::Mailbox, slots * MAILBOX_BLOCKS),
            (
                RegionKind::References,
                (blocks / extent_blocks + 1).div_ceil(REFERENCES_PER_BLOCK),
            ),
        ];
        let mut regions = Vec::new();
        let mut next = FIRST_REGION;
        for (kind, blocks) in sizes {
            let start = Lba(next);
            regions.push(Region {
                kind,
                start,
                blocks,
            });
            next += blocks;
        }
        let start = next.div_ceil(extent_blocks) * extent_blocks;
        let extents = blocks.saturating_sub(start) / extent_blocks;
        if extents < EXTENTS_MIN {
            return Err(LayoutError::TooSmall {
                found: self.device_bytes,
                needed: (start + EXTENTS_MIN * extent_blocks) * BLOCK_BYTES_U64,
            });
        }
        regions.push(Region {
            kind: RegionKind::Extents,
            start: Lba(start),
            blocks: extents * extent_blocks,
        });
        Ok(regions)
    }
}

/// One of a slot's two metadata areas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AreaId {
    /// Whose.
    pub slot: SlotId,
    /// Which: 0 or 1.
    pub half: u8,
}

/// The blocks of a metadata area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Its head.
    pub head: Lba,
    /// The first block of checkpoint rows.
    pub rows: Lba,
    /// Blocks for checkpoint rows.
    pub row_blocks: u64,
    /// The first block of the journal.
    pub journal: Lba,
    /// Blocks for the journal.
    pub journal_blocks: u64,
}

impl Area {
    /// How many rows a checkpoint in this area can have.
    #[must_use]
    pub const fn rows_max(&self) -> u64 {
        self.row_blocks * RECORDS_PER_BLOCK
    }
}

impl Superblock {
    /// This volume and an address on it.
    #[must_use]
    pub const fn place(&self, lba: Lba) -> Place {
        Place {
            volume: self.volume,
            lba,
        }
    }

    /// All slots.
    pub fn slots(&self) -> impl Iterator<Item = SlotId> + use<> {
        (0..self.slot_count).map(SlotId)
    }

    /// The block of a slot's heartbeat record `block`, 0 to 3.
    #[must_use]
    pub fn heartbeat_lba(&self, slot: SlotId, block: u64) -> Lba {
        let first = self.region(RegionKind::Heartbeats).start.0;
        Lba(first + u64::from(slot.0) * HEARTBEAT_RECORDS + block % HEARTBEAT_RECORDS)
    }

    /// The block of a slot's Paxos sub-sector, 0 to 7.
    #[must_use]
    pub fn paxos_lba(&self, slot: SlotId, subsector: u64) -> Lba {
        let first = self.region(RegionKind::Paxos).start.0;
        Lba(first + u64::from(slot.0) * PAXOS_SUBSECTORS + subsector % PAXOS_SUBSECTORS)
    }

    /// A slot's leader block.
    #[must_use]
    pub fn leader_lba(&self, slot: SlotId) -> Lba {
        Lba(self.region(RegionKind::Leaders).start.0 + u64::from(slot.0))
    }

    /// Every metadata area.
    pub fn areas(&self) -> impl Iterator<Item = AreaId> + use<> {
        self.slots()
            .flat_map(|slot| [0, 1].map(|half| AreaId { slot, half }))
    }

    /// The blocks of an area.
    #[must_use]
    pub fn area(&self, id: AreaId) -> Area {
        let region = self.region(RegionKind::Areas);
        let size = region.blocks / (2 * u64::from(self.slot_count));
        let index = u64::from(id.slot.0) * 2 + u64::from(id.half);
        let head = region.start.0 + index * size;
        let journal_blocks = size / 4;
        let row_blocks = size - 1 - journal_blocks;
        Area {
            head: Lba(head),
            rows: Lba(head + 1),
            row_blocks,
            journal: Lba(head + 1 + row_blocks),
            journal_blocks,
        }
    }
}

/// Records of 512 bytes in one block of checkpoint rows.
pub const RECORDS_PER_BLOCK: u64 = (BLOCK_BYTES / RECORD_BYTES) as u64;
/// [`BLOCK_BYTES`] as a count on the volume.
pub const BLOCK_BYTES_U64: u64 = BLOCK_BYTES as u64;
/// 4096-byte blocks in one MiB.
pub(crate) const BLOCKS_PER_MIB: u64 = 256;

/// The first MiB holds the superblocks and nothing else.
const FIRST_REGION: u64 = 256;
/// Metadata areas take at most one 32nd of the volume.
const METADATA_SHARE: u64 = 32;
/// 256 KiB: 376 rows and 16 journal records, enough for a test volume.
const AREA_MIN: u64 = 64;
/// 24 MiB: some 36,000 rows.
const AREA_MAX: u64 = 6144;
const MAILBOX_BLOCKS: u64 = 16;
const REFERENCES_PER_BLOCK: u64 = BLOCK_BYTES_U64 / 8;
/// A volume that cannot hold anything is of no use.
const EXTENTS_MIN: u64 = 16;
