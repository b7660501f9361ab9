//! A whole volume: writing a new one, and finding out which one a device holds.

use std::io;

use bascule_types::{Lba, NodeUid};

use crate::block_store::BlockStore;
use crate::envelope::{BLOCK_BYTES, FormatError, seal_block};
use crate::metadata::{Contradiction, Metadata};
use crate::metadata_log::{Log, LogError};
use crate::metadata_records::{MetaRecord, SlotRow};
use crate::superblock::{RegionKind, SUPERBLOCK_LBAS, Superblock};
use crate::volume_layout::{FormatRequest, LayoutError};

/// Why a volume could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// It cannot be laid out so.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The device failed.
    #[error("cannot write the new volume")]
    Io(#[from] io::Error),
    /// The first checkpoint could not be written.
    #[error("cannot write the first metadata checkpoint")]
    Log(#[from] LogError),
    /// The first rows are wrong.
    #[error("cannot register the first node")]
    Rows(#[from] Contradiction),
}

/// Why a device is not a volume that can be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The device failed.
    #[error("cannot read the superblock")]
    Io(#[source] io::Error),
    /// Not a Bascule volume: neither copy has the magic.
    #[error("the device holds no Bascule volume (magic missing in both superblocks)")]
    NotAVolume,
    /// Made by a later release.
    #[error("the volume's format is newer than this release knows")]
    Newer(#[source] FormatError),
    /// Both copies are damaged.
    #[error("both superblocks are damaged")]
    Damaged(#[source] FormatError),
    /// The device is smaller than the volume.
    #[error("the device is smaller than the volume, which has {blocks} blocks of 4096 bytes")]
    Truncated {
        /// The volume's size in blocks.
        blocks: u64,
    },
}

/// Makes a new volume on a device. Whatever it holds is lost. The superblock is written last: a
/// crash on the way leaves no volume.
///
/// # Errors
/// [`MakeError`].
pub fn make_volume<S: BlockStore>(
    store: &mut S,
    request: &FormatRequest,
    first_node: Option<NodeUid>,
) -> Result<Superblock, MakeError> {
    let superblock = request.lay_out()?;
    for lba in SUPERBLOCK_LBAS {
        store.write(lba, &[0; BLOCK_BYTES])?;
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

/// Reads the superblock: the valid copy with the highest revision.
///
/// # Errors
/// [`OpenError`] tells a foreign device from a damaged volume and from a newer format.
pub fn read_superblock<S: BlockStore>(store: &mut S) -> Result<Superblock, OpenError> {
    let mut best: Option<Superblock> = None;
    let mut worst = FormatError::Magic;
    for lba in SUPERBLOCK_LBAS {
        match read_copy(store, lba).map_err(OpenError::Io)? {
            Ok(copy) if best.as_ref().is_none_or(|b| copy.revision > b.revision) => {
                best = Some(copy);
            }
            Ok(_) | Err(FormatError::Blank | FormatError::Magic) => {}
            Err(error) => worst = error,
        }
    }
    let Some(superblock) = best else {
        return Err(match worst {
            FormatError::Magic => OpenError::NotAVolume,
            FormatError::Newer { .. } | FormatError::Field("incompat flags") => {
                OpenError::Newer(worst)
            }
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

/// One copy of the superblock, or how it is wrong.
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

/// How much is zeroed by one write.
const CHUNK_BLOCKS: usize = 64;
