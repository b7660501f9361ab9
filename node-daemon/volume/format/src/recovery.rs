//! Recovery: reads the newest checkpoint and applies the journal that follows it.
//!
//! # Ordering
//! - Rows are durable before the head that makes them count: rows that do not match a readable head are
//!   damage, not the effect of a crash.
//! - A group is durable before the next one is written: a hole in the journal with a later group behind it is
//!   damage. A hole at the end is a group that was being written, and was acknowledged to nobody.
//! - A journal record that is intact, belongs where it lies, and cannot be understood was written by a later
//!   release. It is an error: taking it for the end of the journal would undo acknowledged changes.

use std::io;
use std::ops::Range;

use bascule_types::{Lba, SlotId};

use crate::area_blocks::{CheckpointHead, CheckpointId, CheckpointRow, JournalBlock};
use crate::block_store::BlockStore;
use crate::damage::{DamagedHead, Obsolete, is_older_head, scan_heads};
use crate::envelope::{BLOCK_BYTES, FormatError, Kind, RECORD_BYTES, open, open_envelope};
use crate::features::UnknownFeatures;
use crate::metadata::{Contradiction, Metadata};
use crate::superblock::Superblock;
use crate::volume_layout::{AreaId, RECORDS_PER_BLOCK};

/// The largest number of records of one group: 32 KiB, half the journal of the smallest area. The larger a
/// group, the more requests share a flush.
pub const GROUP_MAX: usize = 64;

/// The metadata that was read from the volume.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Recovered {
    /// The rows of the checkpoint, with the journal applied.
    pub metadata: Metadata,
    pub base: CheckpointId,
    /// The area with that checkpoint.
    pub area: AreaId,
    /// How many blocks of its journal were applied.
    pub journaled: u64,
    /// Damaged checkpoint heads that are older than `base`.
    pub obsolete: Vec<Obsolete>,
}

/// Why the metadata cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The device failed. After a failed write or flush the log refuses further commits.
    #[error("cannot {what}")]
    Io {
        /// The operation that failed.
        what: &'static str,
        /// The device's error.
        #[source]
        source: io::Error,
    },
    /// A block is damaged that a crash cannot damage.
    #[error("the {what} at block {} is damaged", lba.0)]
    Damaged {
        /// The kind of block.
        what: &'static str,
        /// The block's address.
        lba: Lba,
        /// The kind of damage.
        #[source]
        source: FormatError,
    },
    /// The journal has a hole with a later group behind it.
    #[error("journal record {sequence} at block {} is damaged and later ones follow", lba.0)]
    Hole {
        /// The damaged record's position in the journal.
        sequence: u64,
        /// The damaged block's address.
        lba: Lba,
    },
    /// No area has a checkpoint: the volume was not formatted completely.
    #[error("the volume has no metadata checkpoint")]
    NoCheckpoint,
    /// A record does not fit the rows before it.
    #[error("the metadata contradicts itself")]
    Contradiction(#[from] Contradiction),
    /// More rows than a checkpoint has room for, or more records than a group may have.
    #[error("the metadata has outgrown its area")]
    TooLarge,
    /// An earlier write or flush failed.
    #[error("an earlier metadata write failed")]
    Failed,
    /// This release must not write the volume, or not even use it.
    #[error(transparent)]
    Unknown(UnknownFeatures),
    /// The only area that may be written next has a failed write, which may still land there.
    #[error(
        "a failed write may still land in metadata area {half} of slot {slot}, which comes next: this node \
         does not coordinate again before it was restarted"
    )]
    Barred {
        /// This node's slot.
        slot: SlotId,
        /// The area's half.
        half: u8,
    },
}

/// Reads the newest checkpoint and its journal. Writes nothing.
///
/// # Errors
/// [`LogError`]. A damaged head is an error if nothing proves that it is older than the newest one that
/// can be read: using an older checkpoint could undo acknowledged changes.
pub fn recover<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
) -> Result<Recovered, LogError> {
    let heads = scan_heads(store, superblock).map_err(read_failed)?;
    let newest = heads.newest();
    let mut obsolete = Vec::new();
    for DamagedHead { area, lba, source } in heads.damaged {
        let what = "checkpoint head";
        let older = match &newest {
            Some((_, head)) => is_older_head(store, superblock, area, head).map_err(read_failed)?,
            None => false,
        };
        if !older {
            return Err(LogError::Damaged { what, lba, source });
        }
        obsolete.push(Obsolete { what, lba, source });
    }
    let (area, head) = newest.ok_or(LogError::NoCheckpoint)?;
    let (metadata, journaled) = recover_from(store, superblock, area, &head)?;
    Ok(Recovered {
        metadata,
        base: head.id,
        area,
        journaled,
        obsolete,
    })
}

/// The checkpoint of `head` with its journal applied, and the number of journal blocks.
pub(crate) fn recover_from<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    area: AreaId,
    head: &CheckpointHead,
) -> Result<(Metadata, u64), LogError> {
    let mut metadata = Metadata::new(superblock);
    load_rows(store, superblock, area, head, &mut metadata)?;
    let whole = 0..superblock.area(area).journal_blocks;
    let journaled = replay(store, superblock, (area, head.id), whole, &mut metadata)?;
    Ok((metadata, journaled))
}

fn load_rows<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    id: AreaId,
    head: &CheckpointHead,
    metadata: &mut Metadata,
) -> Result<(), LogError> {
    let area = superblock.area(id);
    if head.rows > area.rows_max() {
        return Err(LogError::TooLarge);
    }
    let blocks = head.rows.div_ceil(RECORDS_PER_BLOCK);
    let mut records = RecordReader::new(area.rows, blocks, ROWS_BLOCKS);
    let mut crc = 0;
    for index in 0..head.rows {
        let lba = records.lba(index);
        let record = records.bytes(store, index)?;
        let damaged = |source| LogError::Damaged {
            what: "checkpoint record",
            lba,
            source,
        };
        let row: CheckpointRow = open(record, superblock.place(lba)).map_err(damaged)?;
        if row.id != head.id || row.index != index {
            return Err(damaged(FormatError::Field("checkpoint")));
        }
        metadata.apply(&row.record)?;
        crc = crc32c::crc32c_append(crc, record);
    }
    if crc == head.crc32c {
        Ok(())
    } else {
        Err(LogError::Damaged {
            what: "checkpoint",
            lba: area.head,
            source: FormatError::Checksum,
        })
    }
}

/// Applies every complete group in these blocks of the journal behind checkpoint `base`. A group begins at the
/// first. Returns the block behind the last group.
pub(crate) fn replay<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    base: (AreaId, CheckpointId),
    blocks: Range<u64>,
    metadata: &mut Metadata,
) -> Result<u64, LogError> {
    let (area, base) = (superblock.area(base.0), base.1);
    let mut journal = RecordReader::new(area.journal, area.journal_blocks, JOURNAL_BLOCKS);
    let mut group = Vec::new();
    let mut next = blocks.start * RECORDS_PER_BLOCK;
    let mut end = next;
    let mut hole = None;
    while next < blocks.end * RECORDS_PER_BLOCK {
        let record = journal_record(store, superblock, &mut journal, base, next)?;
        match (record, hole) {
            (Some(block), None) => {
                group.push(block.record);
                next += 1;
                if !block.more {
                    for record in group.drain(..) {
                        metadata.apply(&record)?;
                    }
                    // The next group begins a block of its own.
                    next = next.next_multiple_of(RECORDS_PER_BLOCK);
                    end = next;
                }
                continue;
            }
            (None, None) => hole = Some(next),
            (Some(block), Some(sequence)) if block.group() > sequence => {
                let lba = journal.lba(sequence);
                return Err(LogError::Hole { sequence, lba });
            }
            (_, Some(hole)) if next >= hole + GROUP_MAX as u64 => break,
            _ => {}
        }
        next += 1;
    }
    Ok(end / RECORDS_PER_BLOCK)
}

/// The record of the journal behind checkpoint `base` with this sequence number; none if it was not written
/// completely since the checkpoint.
fn journal_record<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    records: &mut RecordReader,
    base: CheckpointId,
    sequence: u64,
) -> Result<Option<JournalBlock>, LogError> {
    let lba = records.lba(sequence);
    let bytes = records.bytes(store, sequence)?;
    match open::<JournalBlock>(bytes, superblock.place(lba)) {
        Ok(block) => Ok(Some(block).filter(|block| block.id == base && block.sequence == sequence)),
        Err(source) if is_unknown(source, bytes, base, sequence) => Err(LogError::Damaged {
            what: "journal record",
            lba,
            source,
        }),
        Err(_) => Ok(None),
    }
}

/// Reads records of 512 bytes, many blocks at once because each read costs a round trip.
struct RecordReader {
    start: Lba,
    blocks: u64,
    /// How many blocks one read takes.
    chunk: u64,
    /// The index of the first block in `bytes`.
    first: u64,
    bytes: Vec<u8>,
}

impl RecordReader {
    const fn new(start: Lba, blocks: u64, chunk: u64) -> Self {
        Self {
            start,
            blocks,
            chunk,
            first: 0,
            bytes: Vec::new(),
        }
    }

    /// The block in which a record lies.
    const fn lba(&self, index: u64) -> Lba {
        Lba(self.start.0 + index / RECORDS_PER_BLOCK)
    }

    fn bytes<S: BlockStore>(&mut self, store: &mut S, index: u64) -> Result<&[u8], LogError> {
        let block = index / RECORDS_PER_BLOCK;
        let held = (self.bytes.len() / BLOCK_BYTES) as u64;
        if !(self.first..self.first + held).contains(&block) {
            let count = self.chunk.min(self.blocks.saturating_sub(block));
            let count = usize::try_from(count).unwrap_or(1);
            self.bytes.resize(count * BLOCK_BYTES, 0);
            self.first = block;
            read(store, Lba(self.start.0 + block), &mut self.bytes)?;
        }
        let within = usize::try_from(index - self.first * RECORDS_PER_BLOCK).unwrap_or(0);
        Ok(&self.bytes[within * RECORD_BYTES..][..RECORD_BYTES])
    }
}

/// Whether an intact record of this journal was refused with `error`: one of a later release.
fn is_unknown(error: FormatError, bytes: &[u8], base: CheckpointId, sequence: u64) -> bool {
    if let FormatError::Newer { .. } = error {
        return true;
    }
    let Ok((header, mut body)) = open_envelope(bytes, Kind::Journal) else {
        return false;
    };
    let belongs = header.epoch == base.epoch.0 && body.u64() == base.number;
    matches!(error, FormatError::Field(_)) && belongs && body.u64() == sequence
}

fn read<S: BlockStore>(store: &mut S, lba: Lba, bytes: &mut [u8]) -> Result<(), LogError> {
    store.read(lba, bytes).map_err(read_failed)
}

pub(crate) const fn read_failed(source: io::Error) -> LogError {
    let what = "read metadata";
    LogError::Io { what, source }
}

/// One read of rows: 1 MiB (a guess).
const ROWS_BLOCKS: u64 = 256;
/// One read of the journal, of which a look at it needs little: 64 KiB (a guess).
const JOURNAL_BLOCKS: u64 = 16;
