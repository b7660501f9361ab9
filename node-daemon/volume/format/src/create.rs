//! Formatting a new volume.

use std::io;

use bascule_types::{Lba, NodeUid};

use crate::block_store::BlockStore;
use crate::envelope::{BLOCK_BYTES, seal_block, volume_of};
use crate::metadata::{Contradiction, Metadata};
use crate::metadata_log::Log;
use crate::metadata_records::{MetaRecord, SlotRow};
use crate::recovery::LogError;
use crate::superblock::{RegionKind, Superblock};
use crate::superblock_copies::possible_copies;
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
    let earlier = earlier_copies(store, &superblock)?;
    for lba in superblock.copy_lbas() {
        store.write(lba, &seal_block(&unfinished, superblock.place(lba)))?;
    }
    for lba in earlier {
        zero(store, lba, 1)?;
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
    for lba in superblock.copy_lbas() {
        store.write(lba, &seal_block(&superblock, superblock.place(lba)))?;
    }
    store.flush()?;
    Ok(superblock)
}

/// The copies of earlier volumes' superblocks that this `format` does not overwrite. Should the first superblock of the
/// new volume be damaged one day, a reader could take one of them for its last: where the device ends, if the new
/// volume is shorter, or where it ended when the earlier volume was formatted, if it is cut to that length again.
fn earlier_copies<S: BlockStore>(store: &mut S, superblock: &Superblock) -> io::Result<Vec<Lba>> {
    let mut copies = possible_copies(store)?;
    copies.retain(|lba| !superblock.copy_lbas().contains(lba));
    let mut found = Vec::new();
    for lba in copies {
        let mut block = [0; BLOCK_BYTES];
        match store.read(lba, &mut block) {
            Ok(()) if volume_of(&block).is_some() => found.push(lba),
            Ok(()) => {}
            // The earlier volume was longer than the device is now.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
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
