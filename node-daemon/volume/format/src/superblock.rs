//! The superblock: a volume's identity, feature flags, lease times and regions. Two copies: block 0, and
//! the first block of the volume's last MiB. `format` writes them; every node reads them before it does
//! anything else with the device, and takes the undamaged copy with the higher revision
//! ([`crate::superblock_copies`]).
//!
//! ```text
//! offset size  field                              (header epoch: rises with every rewrite, from 1)
//!     48    4  format version, 2
//!     52    4  zero
//!     56    8  features (see `features`)
//!     64   16  cluster id
//!     80    1  fencing: 1 watchdog, 2 lease only, 3 persistent reservation (refused until it exists)
//!     81    1  policy: 1 = a software watchdog counts, 2 = the out-of-service taint counts
//!     82    2  slot count
//!     84    4  extent size in MiB
//!     88    8  size of the volume in blocks: whole MiB
//!     96   24  timings (see `timing`)
//!    120    2  number of regions
//!    122    6  zero
//!    128  24n  regions: kind (2), zero (6), first LBA (8), blocks (8)
//! ```

use bascule_types::{Bytes, ClusterId, Lba};
use serde::{Deserialize, Serialize};

use crate::envelope::{
    BLOCK_BYTES, BodyReader, BodyWriter, FormatError, Kind, Record, check_version, open_envelope,
};
use crate::features::{Features, UnknownFeatures};
use crate::timing::Timings;

/// The format that this release writes.
pub const FORMAT_VERSION: u16 = 2;
/// The address of the first copy. The first MiB holds nothing else.
pub const FIRST_COPY: Lba = Lba(0);

/// A volume's identity, parameters and regions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Chosen at random by `format`; repeated in the header of every record.
    pub volume: bascule_types::VolumeId,
    /// Rises with every rewrite of the superblock, from 1.
    pub revision: u64,
    /// What a release must know to read or to write the volume. Those of the metadata count: the superblock
    /// follows them.
    pub features: Features,
    /// The cluster to which the volume is bound; nodes of another cluster do not attach it.
    pub cluster: ClusterId,
    /// What proves that a failed node has stopped writing.
    pub fencing: Fencing,
    /// Further proofs that the administrator allowed.
    pub policy: FencingPolicy,
    /// How many nodes can be registered, 1 to 64.
    pub slot_count: u16,
    /// Extent size in MiB, 1 to 1024.
    pub extent_mib: u32,
    /// The size of the volume in 4096-byte blocks, a whole number of MiB. A smaller device is refused.
    pub blocks: u64,
    /// Lease, watch, watchdog and settle times.
    pub timings: Timings,
    /// One region of each known kind; they do not overlap.
    pub regions: Vec<Region>,
}

/// What proves that a failed node has stopped writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Fencing {
    /// No heartbeat for the safe time, from a node that ran under a hardware watchdog.
    Watchdog,
    /// Nothing but a manual fencing confirmation.
    LeaseOnly,
    /// A SCSI-3 reservation key was preempted. Declared; refused until it exists.
    PersistentReservation,
}

/// Proofs that the administrator allowed beyond the fencing mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FencingPolicy {
    /// A software watchdog (softdog) counts like a hardware one, although it hangs with its kernel.
    pub software_watchdog: bool,
    /// The taint `node.kubernetes.io/out-of-service` counts as a fencing confirmation.
    pub out_of_service_taint: bool,
}

/// The purpose of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RegionKind {
    /// Heartbeat records: 4 blocks per slot.
    Heartbeats,
    /// Paxos blocks of the coordinator's election: 8 per slot.
    Paxos,
    /// Leader blocks: 1 per slot.
    Leaders,
    /// Metadata areas: 2 per slot.
    Areas,
    /// Reserved for messages to a node that the network does not reach: 16 blocks per slot.
    Mailbox,
    /// Reserved for reference counts of shared extents: 8 bytes per extent.
    References,
    /// Extents of disks and of saved VM states.
    Extents,
}

/// A run of blocks with one purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Region {
    /// What the blocks are used for.
    pub kind: RegionKind,
    pub start: Lba,
    /// The length in blocks; not zero.
    pub blocks: u64,
}

impl Superblock {
    /// The region of this kind; an empty one if the volume has none, which
    /// [`Superblock::parse_copy`] refuses for every kind that it knows.
    #[must_use]
    pub fn region(&self, kind: RegionKind) -> Region {
        let empty = Region {
            kind,
            start: Lba(0),
            blocks: 0,
        };
        let found = self.regions.iter().find(|region| region.kind == kind);
        found.copied().unwrap_or(empty)
    }

    /// Refuses to write a volume with features that `known` lacks.
    ///
    /// # Errors
    /// [`UnknownFeatures`].
    pub const fn check_writable(&self, known: Features) -> Result<(), UnknownFeatures> {
        let unknown = self.features.without(known);
        if unknown.is_empty() {
            Ok(())
        } else {
            Err(UnknownFeatures(unknown))
        }
    }

    /// The address of the last copy.
    #[must_use]
    pub const fn last_copy(&self) -> Lba {
        Lba(self.blocks.saturating_sub(BLOCKS_PER_MIB))
    }

    /// The addresses of both copies, the first and the last one.
    #[must_use]
    pub const fn copy_lbas(&self) -> [Lba; 2] {
        [FIRST_COPY, self.last_copy()]
    }

    /// The size of an extent in bytes.
    #[must_use]
    pub const fn extent_bytes(&self) -> Bytes {
        Bytes::mib(self.extent_mib)
    }

    /// Parses a copy, read from `here`, of any volume.
    ///
    /// # Errors
    /// [`FormatError`]; distinguishes a newer format from a damaged copy.
    pub fn parse_copy(bytes: &[u8], here: Lba) -> Result<Self, FormatError> {
        let (header, mut body) = open_envelope(bytes, Kind::Superblock)?;
        if header.lba != here {
            return Err(FormatError::Misplaced {
                here,
                found: header.lba,
            });
        }
        let mut superblock = Self::parse(header.epoch, &mut body)?;
        superblock.volume = header.volume;
        Ok(superblock)
    }

    fn check_regions(&self) -> Result<(), FormatError> {
        const WRONG: FormatError = FormatError::Field("regions");
        // The first and the last MiB hold the copies of the superblock, and nothing else.
        let mut end = BLOCKS_PER_MIB;
        let mut sorted = self.regions.clone();
        sorted.sort_by_key(|region| region.start);
        for region in &sorted {
            let next = region.start.0.checked_add(region.blocks).ok_or(WRONG)?;
            if region.start.0 < end || next > self.last_copy().0 || region.blocks == 0 {
                return Err(WRONG);
            }
            end = next;
        }
        let every = RegionKind::ALL.iter().all(|kind| {
            let mut of_kind = self.regions.iter().filter(|region| region.kind == *kind);
            let room = of_kind.next().map_or(0, |region| region.blocks);
            room >= kind.blocks_min(self.slot_count) && of_kind.next().is_none()
        });
        if every { Ok(()) } else { Err(WRONG) }
    }
}

impl Record for Superblock {
    const KIND: Kind = Kind::Superblock;

    fn epoch(&self) -> u64 {
        self.revision
    }

    fn encode(&self, body: &mut BodyWriter<'_>) {
        body.u32(FORMAT_VERSION.into());
        body.u32(0);
        body.u64(self.features.bits());
        body.bytes(&self.cluster.to_bytes());
        body.u8(self.fencing.code());
        body.u8(self.policy.code());
        body.u16(self.slot_count);
        body.u32(self.extent_mib);
        body.u64(self.blocks);
        self.timings.encode(body);
        body.u16(u16::try_from(self.regions.len()).unwrap_or(u16::MAX));
        body.zeroes(6);
        for region in &self.regions {
            body.u16(region.kind.code());
            body.zeroes(6);
            body.u64(region.start.0);
            body.u64(region.blocks);
        }
    }

    fn parse(epoch: u64, body: &mut BodyReader<'_>) -> Result<Self, FormatError> {
        let found = u16::try_from(body.u32()).unwrap_or(u16::MAX);
        check_version(found, FORMAT_VERSION)?;
        body.u32();
        let features = Features::from_bits(body.u64());
        let cluster = ClusterId::from_bytes(body.array());
        let fencing = Fencing::from_code(body.u8())?;
        let policy = FencingPolicy::from_code(body.u8())?;
        let slot_count = body.u16();
        let extent_mib = body.u32();
        let blocks = body.u64();
        let timings = Timings::parse(body)?;
        if slot_count == 0 || slot_count > SLOTS_MAX {
            return Err(FormatError::Field("slot count"));
        }
        if extent_mib == 0 || extent_mib > EXTENT_MIB_MAX {
            return Err(FormatError::Field("extent size"));
        }
        if !blocks.is_multiple_of(BLOCKS_PER_MIB) {
            return Err(FormatError::Field("size of the volume"));
        }
        let superblock = Self {
            volume: bascule_types::VolumeId::from_bytes([0; 16]),
            revision: epoch,
            features,
            cluster,
            fencing,
            policy,
            slot_count,
            extent_mib,
            blocks,
            timings,
            regions: parse_regions(body)?,
        };
        superblock.check_regions()?;
        Ok(superblock)
    }
}

/// The address of the last copy of a volume that ends where a device with so many blocks does; none if there is no
/// room for one.
#[must_use]
pub const fn last_copy(device_blocks: u64) -> Option<Lba> {
    match device_blocks / BLOCKS_PER_MIB {
        0 | 1 => None,
        mib => Some(Lba((mib - 1) * BLOCKS_PER_MIB)),
    }
}

/// 4096-byte blocks in one MiB.
pub(crate) const BLOCKS_PER_MIB: u64 = 256;
/// The largest slot count of a volume.
pub const SLOTS_MAX: u16 = 64;
const EXTENT_MIB_MAX: u32 = 1024;
/// The body has room for 16; no release has written more than 7.
const REGIONS_MAX: u16 = 14;

fn parse_regions(body: &mut BodyReader<'_>) -> Result<Vec<Region>, FormatError> {
    let count = body.u16();
    body.array::<6>();
    if count > REGIONS_MAX {
        return Err(FormatError::Field("number of regions"));
    }
    let mut regions = Vec::new();
    for _ in 0..count {
        let kind = body.u16();
        body.array::<6>();
        let (start, blocks) = (Lba(body.u64()), body.u64());
        let kind = RegionKind::from_code(kind).ok_or(FormatError::Field("regions"))?;
        regions.push(Region {
            kind,
            start,
            blocks,
        });
    }
    Ok(regions)
}

impl RegionKind {
    /// Every kind that this release knows.
    pub const ALL: [Self; 7] = [
        Self::Heartbeats,
        Self::Paxos,
        Self::Leaders,
        Self::Areas,
        Self::Mailbox,
        Self::References,
        Self::Extents,
    ];

    const fn code(self) -> u16 {
        match self {
            Self::Heartbeats => 1,
            Self::Paxos => 2,
            Self::Leaders => 3,
            Self::Areas => 4,
            Self::Mailbox => 5,
            Self::References => 6,
            Self::Extents => 7,
        }
    }

    fn from_code(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }
}

impl Fencing {
    const fn code(self) -> u8 {
        match self {
            Self::Watchdog => 1,
            Self::LeaseOnly => 2,
            Self::PersistentReservation => 3,
        }
    }

    const fn from_code(code: u8) -> Result<Self, FormatError> {
        match code {
            1 => Ok(Self::Watchdog),
            2 => Ok(Self::LeaseOnly),
            3 => Ok(Self::PersistentReservation),
            _ => Err(FormatError::Field("fencing")),
        }
    }
}

impl FencingPolicy {
    fn code(self) -> u8 {
        u8::from(self.software_watchdog) | (u8::from(self.out_of_service_taint) << 1)
    }

    const fn from_code(code: u8) -> Result<Self, FormatError> {
        if code > 3 {
            return Err(FormatError::Field("fencing policy"));
        }
        Ok(Self {
            software_watchdog: code & 1 != 0,
            out_of_service_taint: code & 2 != 0,
        })
    }
}

const _: () = assert!(BLOCK_BYTES == 4096, "addresses count 4096-byte blocks");
