//! Formatting a new volume, and reading the superblock of an existing one.

use std::cmp::Ordering;
use std::io;

use bascule_types::{Lba, NodeUid, VolumeId};

use crate::block_store::BlockStore;
use crate::envelope::{BLOCK_BYTES, FormatError, Kind, seal_block};
use crate::metadata::{Contradiction, Metadata};
use crate::metadata_log::Log;
use crate::metadata_records::{MetaRecord, SlotRow};
use crate::recovery::LogError;
use crate::superblock::{RegionKind, SUPERBLOCK_LBAS, Superblock};
use crate::unfinished_format::UnfinishedFormat;
use crate::volume_layout::{FormatRequest, LayoutError};

/// Why a device could not be formatted.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// The device cannot have the requested layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The device failed.
    #[error("cannot write the new volume")]
    Io(#[from] io::Error),
    /// The first checkpoint could not be written.
    #[error("cannot write the first metadata checkpoint")]
    Log(#[from] LogError),
    /// The first row does not fit the new volume.
    #[error("cannot register the first node")]
    Rows(#[from] Contradiction),
}

/// Why a device cannot be opened as a volume.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The device failed.
    #[error("cannot read the superblock")]
    Io(#[source] io::Error),
    /// Neither superblock has the magic: not a Bascule volume.
    #[error("the device holds no Bascule volume (magic missing in both superblocks)")]
    NotAVolume,
    /// Both superblocks are still to be written.
    #[error("the device holds no Bascule volume: its format has not finished")]
    Unfinished,
    /// The volume was formatted or upgraded by a later release.
    #[error("the volume's format is newer than this release knows")]
    Newer(#[source] FormatError),
    /// The volume was formatted by an earlier release, whose format this one does not read.
    #[error(
        "the volume's format is of an earlier release, and this one does not read it: format the device"
    )]
    Older(#[source] FormatError),
    /// Neither superblock is intact.
    #[error("both superblocks are damaged")]
    Damaged(#[source] FormatError),
    /// Both superblocks are intact, and of two volumes.
    #[error(
        "the two superblocks are of two volumes, {first} and {second}: format the device, or restore one"
    )]
    TwoVolumes {
        /// The volume of the first copy.
        first: VolumeId,
        /// The volume of the second copy.
        second: VolumeId,
    },
    /// Both superblocks are intact, have the same revision, and differ.
    #[error(
        "the two superblocks have revision {revision} both, and differ: neither can be trusted"
    )]
    CopiesDiffer {
        /// The revision of both.
        revision: u64,
    },
    /// The device is smaller than the superblock says.
    #[error("the device is smaller than the volume, which has {blocks} blocks of 4096 bytes")]
    Truncated {
        /// The volume's size in blocks.
        blocks: u64,
    },
}

/// Formats a device as a new volume; its previous contents are lost. The superblock is written last:
/// after a crash on the way the device holds no volume, but an [`UnfinishedFormat`] in its place.
///
/// # Assumes
/// That the writes of every earlier `format` of the device have ended: if [`crate::find_unfinished_format`] finds one,
/// its host was reset, and its settle time has passed. A late write of it would undo one of this `format`, or of a node
/// that has attached the volume since. The first write of a `format`, should that be the one that failed, can
/// only replace one copy of the superblock, of which the other is intact.
///
/// # Errors
/// [`MakeError`].
pub fn make_volume<S: BlockStore>(
    store: &mut S,
    request: &FormatRequest,
    first_node: Option<NodeUid>,
) -> Result<Superblock, MakeError> {
    let superblock = request.lay_out()?;
    let unfinished = UnfinishedFormat {
        settle: request.timings.settle,
    };
    for lba in SUPERBLOCK_LBAS {
        store.write(lba, &seal_block(&unfinished, superblock.place(lba)))?;
    }
    store.flush()?;
    for kind in [
        RegionKind::Heartbeats,
        RegionKind::Paxos,
        RegionKind::Leaders,
        RegionKind::Mailbox,
        RegionKind::References,
    ] {
        let region = superblock.region(kind);
        zero(store, region.start, region.blocks)?;
    }
    for area in superblock.areas() {
        zero(store, superblock.area(area).head, 1)?;
    }
    let mut metadata = Metadata::new(&superblock);
    if let Some(node) = first_node {
        metadata.apply(&MetaRecord::Slot(SlotRow {
            slot: bascule_types::SlotId(0),
            node,
            generation: bascule_types::Generation(0),
            boot: [0; 16],
        }))?;
    }
    Log::format(store, &superblock, &metadata)?;
    for lba in SUPERBLOCK_LBAS {
        store.write(lba, &seal_block(&superblock, superblock.place(lba)))?;
    }
    store.flush()?;
    Ok(superblock)
}

/// Reads the superblock: the undamaged copy with the highest revision.
///
/// # Errors
/// [`OpenError`] distinguishes a foreign device, a damaged volume and a newer format. Two intact copies
/// must be of one volume, and equal if they have the same revision: `format` erases both before it
/// writes either.
pub fn read_superblock<S: BlockStore>(store: &mut S) -> Result<Superblock, OpenError> {
    let mut best: Option<Superblock> = None;
    let mut worst = FormatError::Magic;
    let mut is_unfinished = false;
    for lba in SUPERBLOCK_LBAS {
        match read_copy(store, lba).map_err(OpenError::Io)? {
            Ok(copy) => {
                best = Some(match best.take() {
                    Some(first) => newer_copy(first, copy)?,
                    None => copy,
                });
            }
            Err(FormatError::Blank | FormatError::Magic) => {}
            Err(FormatError::Kind { found, .. }) if found == Kind::UnfinishedFormat.code() => {
                is_unfinished = true;
            }
            Err(error) => worst = error,
        }
    }
    let Some(superblock) = best else {
        return Err(match worst {
            FormatError::Magic if is_unfinished => OpenError::Unfinished,
            FormatError::Magic => OpenError::NotAVolume,
            FormatError::Newer { .. } | FormatError::Field("incompat flags") => {
                OpenError::Newer(worst)
            }
            FormatError::Older { .. } => OpenError::Older(worst),
            _ => OpenError::Damaged(worst),
        });
    };
    let last = Lba(superblock.blocks.saturating_sub(1));
    let mut block = [0; BLOCK_BYTES];
    match store.read(last, &mut block) {
        Ok(()) => Ok(superblock),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(OpenError::Truncated {
            blocks: superblock.blocks,
        }),
        Err(error) => Err(OpenError::Io(error)),
    }
}

/// The copy with the higher revision of two intact ones.
fn newer_copy(first: Superblock, second: Superblock) -> Result<Superblock, OpenError> {
    if first.volume != second.volume {
        return Err(OpenError::TwoVolumes {
            first: first.volume,
            second: second.volume,
        });
    }
    match first.revision.cmp(&second.revision) {
        Ordering::Greater => Ok(first),
        Ordering::Less => Ok(second),
        Ordering::Equal if first == second => Ok(first),
        Ordering::Equal => Err(OpenError::CopiesDiffer {
            revision: first.revision,
        }),
    }
}

/// Reads one copy of the superblock: the inner error says what is wrong with it.
///
/// # Errors
/// The device's.
pub fn read_copy<S: BlockStore>(
    store: &mut S,
    lba: Lba,
) -> io::Result<Result<Superblock, FormatError>> {
    let mut block = [0; BLOCK_BYTES];
    match store.read(lba, &mut block) {
        Ok(()) => Ok(Superblock::parse_copy(&block, lba)),
        // A device that ends before the second copy is not a volume.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Err(FormatError::Blank)),
        Err(error) => Err(error),
    }
}

fn zero<S: BlockStore>(store: &mut S, start: Lba, blocks: u64) -> io::Result<()> {
    let zeroes = vec![0; BLOCK_BYTES * CHUNK_BLOCKS];
    let mut next = start.0;
    let end = start.0 + blocks;
    while next < end {
        let count = usize::try_from(end - next).map_or(CHUNK_BLOCKS, |left| left.min(CHUNK_BLOCKS));
        store.write(Lba(next), &zeroes[..count * BLOCK_BYTES])?;
        next += count as u64;
    }
    Ok(())
}

/// Blocks that one write zeroes: 256 KiB (a guess).
const CHUNK_BLOCKS: usize = 64;
