//! The position of every region: computed once by `format`, and afterwards read from the
//! superblock.
//!
//! ```text
//! first LBA      blocks                region
//!         0           1                superblock, first copy
//!       256   slots × 4                heartbeats: record n of slot s at 256 + 4·s + n mod 4
//!       then  slots × 8                paxos
//!       then  slots × 1                leaders
//!       then  slots × 2 × area         metadata areas: half h of slot s is area number 2·s + h
//!       then  slots × 16               mailbox (reserved)
//!       then  1 per 512 extents        references (reserved)
//!    aligned  whole extents            extents, from the next multiple of the extent size on
//!  end - 256           1                superblock, last copy
//! ```
//! The volume has whole MiB (256 blocks). The rest of the first and of the last MiB is unused.
//!
//! `area` is 1/32 of the volume divided by the number of areas: 64 to 24,576 blocks, a multiple of 16.
//!
//! # Metadata areas
//! Each slot has two areas and its node writes no others, so that a deposed coordinator's late
//! write cannot damage its successor's metadata.
//!
//! ```text
//! block            blocks                contents
//!     0                 1                checkpoint head
//!     1                 the rest         checkpoint rows, eight 512-byte records to a block
//!     last quarter      size / 4         journal, one record to a block
//! ```

use bascule_types::{ClusterId, Lba, SlotId, VolumeId};

use crate::election_blocks::PAXOS_SUBSECTORS;
use crate::envelope::{BLOCK_BYTES, Place, RECORD_BYTES};
use crate::features::Features;
use crate::heartbeat::HEARTBEAT_RECORDS;
use crate::superblock::{
    BLOCKS_PER_MIB, Fencing, FencingPolicy, Region, RegionKind, SLOTS_MAX, Superblock,
};
use crate::timing::{TimingError, Timings};

/// The parameters of a new volume.
#[derive(Clone, Debug)]
pub struct FormatRequest {
    /// The new volume's identity.
    pub volume: VolumeId,
    /// The cluster to which the volume is bound.
    pub cluster: ClusterId,
    /// What proves that a failed node has stopped writing.
    pub fencing: Fencing,
    /// Further proofs that the administrator allows.
    pub policy: FencingPolicy,
    /// Lease, watch, watchdog and settle times.
    pub timings: Timings,
    /// How many nodes can be registered, 1 to 64.
    pub slot_count: u16,
    /// Extent size in MiB, 1 to 1024.
    pub extent_mib: u32,
    /// The device's size in bytes; what exceeds whole MiB is not part of the volume, and what exceeds whole
    /// extents stays unused.
    pub device_bytes: u64,
}

/// Why a volume cannot have the requested parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The device has no room for the metadata, 16 extents and the last copy of the superblock.
    #[error("the device has {found} bytes; this layout needs at least {needed}")]
    TooSmall {
        /// The device's size in bytes.
        found: u64,
        /// The smallest sufficient size in bytes.
        needed: u64,
    },
    /// The slot count is out of range.
    #[error("the slot count must be 1 to 64")]
    SlotCount,
    /// The extent size is out of range.
    #[error("the extent size must be 1 to 1024 MiB")]
    ExtentSize,
    /// The times do not make a lease safe.
    #[error("the timing is not safe")]
    Timing(#[from] TimingError),
    /// This release does not implement the fencing mode.
    #[error("fencing PersistentReservation is not supported yet; use Watchdog or LeaseOnly")]
    NotSupported,
}

impl FormatRequest {
    /// Computes the superblock of the requested volume.
    ///
    /// # Errors
    /// [`LayoutError`].
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
        let blocks = self.device_bytes / BLOCK_BYTES_U64 / BLOCKS_PER_MIB * BLOCKS_PER_MIB;
        let regions = self.regions(blocks)?;
        Ok(Superblock {
            volume: self.volume,
            revision: 1,
            features: Features::NONE,
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
        let mut next = BLOCKS_PER_MIB;
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
        let extents = blocks.saturating_sub(start + BLOCKS_PER_MIB) / extent_blocks;
        if extents < EXTENTS_MIN {
            return Err(LayoutError::TooSmall {
                found: self.device_bytes,
                needed: (start + EXTENTS_MIN * extent_blocks + BLOCKS_PER_MIB) * BLOCK_BYTES_U64,
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
    /// The slot whose node writes the area.
    pub slot: SlotId,
    /// 0 or 1.
    pub half: u8,
}

/// A part of a slot's election blocks and areas that is rewritten as a whole. A write to it that lands
/// late may destroy what was written to the same part since, and nothing else.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub enum SlotPart {
    /// The Paxos block with this index, 0 to 7.
    Paxos(u64),
    /// The leader block.
    Leader,
    /// The metadata area of this half, 0 or 1, with its checkpoint and journal.
    Area(u8),
}

/// The position of a metadata area's parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Area {
    pub head: Lba,
    /// The first block of checkpoint rows.
    pub rows: Lba,
    /// The number of blocks for checkpoint rows.
    pub row_blocks: u64,
    /// The first block of the journal.
    pub journal: Lba,
    /// The number of blocks for the journal; each takes one record.
    pub journal_blocks: u64,
}

impl RegionKind {
    /// The fewest blocks of such a region on a volume with so many slots: the addresses of its slots' parts lie
    /// in it.
    pub(crate) fn blocks_min(self, slot_count: u16) -> u64 {
        let of_slot = match self {
            Self::Heartbeats => HEARTBEAT_RECORDS,
            Self::Paxos => PAXOS_SUBSECTORS,
            Self::Leaders => 1,
            Self::Areas => 2 * AREA_MIN,
            Self::Mailbox => MAILBOX_BLOCKS,
            Self::References | Self::Extents => return 1,
        };
        u64::from(slot_count) * of_slot
    }
}

impl Area {
    /// The largest number of rows of a checkpoint in this area.
    #[must_use]
    pub const fn rows_max(&self) -> u64 {
        self.row_blocks * RECORDS_PER_BLOCK
    }
}

impl Superblock {
    /// An address on this volume.
    #[must_use]
    pub const fn place(&self, lba: Lba) -> Place {
        Place {
            volume: self.volume,
            lba,
        }
    }

    /// All slots, registered or not.
    pub fn slots(&self) -> impl Iterator<Item = SlotId> + use<> {
        (0..self.slot_count).map(SlotId)
    }

    /// The address of a slot's heartbeat block `block mod 4`.
    #[must_use]
    pub fn heartbeat_lba(&self, slot: SlotId, block: u64) -> Lba {
        let first = self.region(RegionKind::Heartbeats).start.0;
        Lba(first + u64::from(slot.0) * HEARTBEAT_RECORDS + block % HEARTBEAT_RECORDS)
    }

    /// The address of a slot's Paxos block `subsector mod 8`.
    #[must_use]
    pub fn paxos_lba(&self, slot: SlotId, subsector: u64) -> Lba {
        let first = self.region(RegionKind::Paxos).start.0;
        Lba(first + u64::from(slot.0) * PAXOS_SUBSECTORS + subsector % PAXOS_SUBSECTORS)
    }

    /// The address of a slot's leader block.
    #[must_use]
    pub fn leader_lba(&self, slot: SlotId) -> Lba {
        Lba(self.region(RegionKind::Leaders).start.0 + u64::from(slot.0))
    }

    /// All metadata areas, two per slot.
    pub fn areas(&self) -> impl Iterator<Item = AreaId> + use<> {
        self.slots()
            .flat_map(|slot| [0, 1].map(|half| AreaId { slot, half }))
    }

    /// The part of a slot's election blocks or areas at `lba`; none elsewhere.
    #[must_use]
    pub fn slot_part(&self, lba: Lba) -> Option<(SlotId, SlotPart)> {
        let index_in = |kind, per_slot: u64| {
            let region = self.region(kind);
            let index = lba.0.checked_sub(region.start.0)?;
            let slot = u16::try_from(index / per_slot.max(1)).ok()?;
            let within = index < region.blocks && slot < self.slot_count;
            within.then_some((SlotId(slot), index % per_slot.max(1)))
        };
        let slots = u64::from(self.slot_count);
        if let Some((slot, subsector)) = index_in(RegionKind::Paxos, PAXOS_SUBSECTORS) {
            return Some((slot, SlotPart::Paxos(subsector)));
        }
        if let Some((slot, _)) = index_in(RegionKind::Leaders, 1) {
            return Some((slot, SlotPart::Leader));
        }
        let area = self.region(RegionKind::Areas).blocks / (2 * slots);
        let (slot, index) = index_in(RegionKind::Areas, 2 * area)?;
        Some((slot, SlotPart::Area(u8::from(index >= area))))
    }

    /// The position of an area's parts.
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

/// 512-byte records in one block of checkpoint rows.
pub const RECORDS_PER_BLOCK: u64 = (BLOCK_BYTES / RECORD_BYTES) as u64;
/// [`BLOCK_BYTES`] as the type of on-disk counts.
pub const BLOCK_BYTES_U64: u64 = BLOCK_BYTES as u64;

/// Metadata areas together take at most 1/32 of the volume, but at least [`AREA_MIN`] each.
const METADATA_SHARE: u64 = 32;
/// 256 KiB: 376 rows and 16 journal records, enough for a test volume.
const AREA_MIN: u64 = 64;
/// 96 MiB: some 147,000 rows, as of 10,000 VMs with four rows each and 100,000 disks more.
const AREA_MAX: u64 = 24_576;
const MAILBOX_BLOCKS: u64 = 16;
const REFERENCES_PER_BLOCK: u64 = BLOCK_BYTES_U64 / 8;
/// The fewest extents of a volume (a guess): a smaller one has no room for a disk.
const EXTENTS_MIN: u64 = 16;
