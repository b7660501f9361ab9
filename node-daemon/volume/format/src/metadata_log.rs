//! The metadata on the volume: recovery, checkpoints, and the journal of one coordinator epoch.
//!
//! # States
//! ```text
//!            ┌──────── recover ────────┐          start            commit ⟲ (journal full:
//!  any state │ newest checkpoint,      │ Recovered ─────► Log ◄────────────  checkpoint first)
//!            │ then its journal        │      checkpoint in the own        failed write or flush:
//!            └─────────────────────────┘      area that is not its base    the Log refuses more
//! ```
//!
//! # Ordering
//! - A coordinator makes its leader block durable, then recovers, then starts its own log with a
//!   checkpoint, then answers. Records that a deposed coordinator still appends to its own journal
//!   are therefore never read once its successor has answered a request.
//! - Rows are flushed before the head that makes them count. A group of records is flushed before
//!   its request is answered, and the next group is written after that. So a hole in the journal
//!   with a later group behind it is damage, not the effect of a crash.
//! - A checkpoint goes to the area of this slot that is not the base of what was recovered, after a
//!   flush has made that base durable: the base is not overwritten while it may still be needed.
//! - An area with a failed write is not written again before the node was reset: that write may still
//!   land, on top of a later record.

use std::collections::BTreeSet;
use std::io;

use bascule_types::{Lba, SlotId};

use crate::area_blocks::{CheckpointHead, CheckpointId, CheckpointRow, JournalBlock};
use crate::block_store::BlockStore;
use crate::damage::{DamagedHead, Obsolete, is_older_head, scan_heads};
use crate::election_blocks::CoordinatorEpoch;
use crate::envelope::{BLOCK_BYTES, FormatError, RECORD_BYTES, open, seal, seal_block};
use crate::metadata::{Contradiction, Metadata};
use crate::metadata_records::MetaRecord;
use crate::superblock::Superblock;
use crate::volume_layout::{Area, AreaId, SlotPart};

/// The largest number of records of one group.
pub const GROUP_MAX: usize = 8;

/// The metadata that was read from the volume.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Recovered {
    /// The rows of the checkpoint, with the journal applied.
    pub metadata: Metadata,
    pub base: CheckpointId,
    /// The area with that checkpoint.
    pub area: AreaId,
    /// How many journal records were applied.
    pub journaled: u64,
    /// Damaged checkpoint heads that are older than `base`.
    pub obsolete: Vec<Obsolete>,
}

/// The journal of one coordinator.
#[derive(Debug)]
pub struct Log {
    superblock: Superblock,
    area: AreaId,
    id: CheckpointId,
    next: u64,
    /// Whether a failed write may still land in the half with this index.
    barred: [bool; 2],
    failed: bool,
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

/// The checkpoint of `head` with its journal applied, and the number of journal records.
pub(crate) fn recover_from<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    area: AreaId,
    head: &CheckpointHead,
) -> Result<(Metadata, u64), LogError> {
    let mut metadata = Metadata::new(superblock);
    load_rows(store, superblock, area, head, &mut metadata)?;
    let journaled = replay(store, superblock, area, head.id, &mut metadata)?;
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
    let (mut index, mut crc, mut lba) = (0, 0, area.rows);
    while index < head.rows {
        let mut block = [0; BLOCK_BYTES];
        read(store, lba, &mut block)?;
        for record in block.chunks_exact(RECORD_BYTES) {
            if index == head.rows {
                break;
            }
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
            index += 1;
        }
        lba = Lba(lba.0 + 1);
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

/// Applies every complete group that follows the checkpoint; returns the number of their records.
fn replay<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    id: AreaId,
    base: CheckpointId,
    metadata: &mut Metadata,
) -> Result<u64, LogError> {
    let area = superblock.area(id);
    let mut group = Vec::new();
    let mut applied = 0;
    let mut hole = None;
    let mut chunk = Chunk::default();
    for sequence in 0..area.journal_blocks {
        let lba = Lba(area.journal.0 + sequence);
        let bytes = chunk.block(store, &area, sequence)?;
        let block = open::<JournalBlock>(bytes, superblock.place(lba)).ok();
        let block = block.filter(|block| block.id == base && block.sequence == sequence);
        match (block, hole) {
            (Some(block), None) => {
                let more = block.more;
                group.push(block.record);
                if !more {
                    applied = sequence + 1;
                    for record in group.drain(..) {
                        metadata.apply(&record)?;
                    }
                }
            }
            (None, None) => hole = Some(sequence),
            // Every group is flushed before the next is written: a group that starts behind the hole
            // proves that the hole once held a durable record.
            (Some(block), Some(sequence)) if block.group() > sequence => {
                let lba = Lba(area.journal.0 + sequence);
                return Err(LogError::Hole { sequence, lba });
            }
            (_, Some(hole)) if sequence >= hole + GROUP_MAX as u64 => break,
            _ => {}
        }
    }
    Ok(applied)
}

/// Read buffer: consecutive blocks of a journal, read at once because each read costs a round trip.
#[derive(Default)]
struct Chunk {
    first: u64,
    bytes: Vec<u8>,
}

impl Chunk {
    fn block<S: BlockStore>(
        &mut self,
        store: &mut S,
        area: &Area,
        sequence: u64,
    ) -> Result<&[u8], LogError> {
        let held = (self.bytes.len() / BLOCK_BYTES) as u64;
        if !(self.first..self.first + held).contains(&sequence) {
            let count = CHUNK_BLOCKS.min(area.journal_blocks - sequence);
            let count = usize::try_from(count).unwrap_or(1);
            self.bytes.resize(count * BLOCK_BYTES, 0);
            self.first = sequence;
            read(store, Lba(area.journal.0 + sequence), &mut self.bytes)?;
        }
        let index = usize::try_from(sequence - self.first).unwrap_or(0);
        Ok(&self.bytes[index * BLOCK_BYTES..][..BLOCK_BYTES])
    }
}

/// The half of `slot`'s two areas in which a coordinator starts that recovered from `base`.
///
/// # Errors
/// [`LogError::Barred`] when a failed write may still land there.
pub fn starting_half(
    base: AreaId,
    slot: SlotId,
    barred: &BTreeSet<SlotPart>,
) -> Result<u8, LogError> {
    let half = u8::from(base == AreaId { slot, half: 0 });
    let other = 1 - half;
    match (
        barred.contains(&SlotPart::Area(half)),
        base == AreaId { slot, half: other },
    ) {
        (false, _) => Ok(half),
        // Neither is the base: any will do.
        (true, false) if !barred.contains(&SlotPart::Area(other)) => Ok(other),
        (true, _) => Err(LogError::Barred { slot, half }),
    }
}

/// 64 KiB (a guess).
const CHUNK_BLOCKS: u64 = 16;

impl Log {
    /// Starts a new coordinator's journal with a checkpoint of `recovered`. The coordinator's leader
    /// block must have been durable before `recovered` was read. No part of the slot in `barred` is
    /// written: failed writes of this boot may still land there.
    ///
    /// # Errors
    /// [`LogError`].
    pub fn start<S: BlockStore>(
        store: &mut S,
        superblock: &Superblock,
        recovered: &Recovered,
        (slot, epoch): (SlotId, CoordinatorEpoch),
        barred: &BTreeSet<SlotPart>,
    ) -> Result<Self, LogError> {
        let half = starting_half(recovered.area, slot, barred)?;
        let mut log = Self {
            superblock: superblock.clone(),
            area: AreaId { slot, half },
            id: CheckpointId { epoch, number: 1 },
            next: 0,
            barred: [0, 1].map(|half| barred.contains(&SlotPart::Area(half))),
            failed: false,
        };
        // The recovered head may only be in the device's cache, after its writer crashed before the
        // flush. Losing it later would bring back the area that this checkpoint overwrites.
        flush(store, "flush the recovered checkpoint")?;
        log.write_checkpoint(store, &recovered.metadata)?;
        Ok(log)
    }

    /// The coordinator epoch of this journal.
    #[must_use]
    pub const fn epoch(&self) -> CoordinatorEpoch {
        self.id.epoch
    }

    /// Makes a group of records durable and applies it to `metadata`.
    ///
    /// # Errors
    /// [`LogError`]. Whether the group is durable is then unknown, and the log refuses further ones
    /// (sticky failure).
    pub fn commit<S: BlockStore>(
        &mut self,
        store: &mut S,
        metadata: &mut Metadata,
        records: &[MetaRecord],
    ) -> Result<(), LogError> {
        if self.failed {
            return Err(LogError::Failed);
        }
        // Cleared at the end, so that every early return leaves the log failed.
        self.failed = true;
        if records.len() > GROUP_MAX {
            return Err(LogError::TooLarge);
        }
        let journal = self.superblock.area(self.area);
        if self.next + records.len() as u64 > journal.journal_blocks {
            let half = 1 - self.area.half;
            if self.barred[usize::from(half)] {
                let slot = self.area.slot;
                return Err(LogError::Barred { slot, half });
            }
            self.area = AreaId { half, ..self.area };
            self.id.number += 1;
            self.next = 0;
            self.write_checkpoint(store, metadata)?;
        }
        self.append(store, records)?;
        for record in records {
            metadata.apply(record)?;
        }
        self.failed = false;
        Ok(())
    }

    fn append<S: BlockStore>(
        &mut self,
        store: &mut S,
        records: &[MetaRecord],
    ) -> Result<(), LogError> {
        let area = self.superblock.area(self.area);
        let first = Lba(area.journal.0 + self.next);
        let mut bytes = Vec::with_capacity(records.len() * BLOCK_BYTES);
        for (position, record) in (0_u8..).zip(records) {
            let block = JournalBlock {
                id: self.id,
                sequence: self.next,
                position,
                more: usize::from(position) + 1 < records.len(),
                record: record.clone(),
            };
            let lba = Lba(area.journal.0 + self.next);
            bytes.extend_from_slice(&seal_block(&block, self.superblock.place(lba)));
            self.next += 1;
        }
        write(store, first, &bytes, "write the journal")?;
        flush(store, "flush the journal")
    }

    fn write_checkpoint<S: BlockStore>(
        &mut self,
        store: &mut S,
        metadata: &Metadata,
    ) -> Result<(), LogError> {
        let area = self.superblock.area(self.area);
        let rows = metadata.row_count();
        if rows > area.rows_max() {
            return Err(LogError::TooLarge);
        }
        let mut crc = 0;
        let mut bytes = Vec::new();
        for (index, record) in (0_u64..).zip(metadata.rows()) {
            let lba = Lba(area.rows.0 + index * RECORD_BYTES as u64 / BLOCK_BYTES as u64);
            let row = CheckpointRow {
                id: self.id,
                index,
                record,
            };
            let record = seal(&row, self.superblock.place(lba));
            crc = crc32c::crc32c_append(crc, &record);
            bytes.extend_from_slice(&record);
        }
        bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        write(store, area.rows, &bytes, "write the checkpoint records")?;
        flush(store, "flush the checkpoint records")?;
        let head = CheckpointHead {
            id: self.id,
            rows,
            crc32c: crc,
        };
        let block = seal_block(&head, self.superblock.place(area.head));
        write(store, area.head, &block, "write the checkpoint head")?;
        flush(store, "flush the checkpoint head")
    }

    /// The first checkpoint of a volume that is being formatted.
    pub(crate) fn format<S: BlockStore>(
        store: &mut S,
        superblock: &Superblock,
        metadata: &Metadata,
    ) -> Result<(), LogError> {
        let slot = SlotId(0);
        let mut log = Self {
            superblock: superblock.clone(),
            area: AreaId { slot, half: 0 },
            id: CheckpointId {
                epoch: CoordinatorEpoch(0),
                number: 1,
            },
            next: 0,
            barred: [false; 2],
            failed: false,
        };
        log.write_checkpoint(store, metadata)
    }
}

fn read<S: BlockStore>(store: &mut S, lba: Lba, bytes: &mut [u8]) -> Result<(), LogError> {
    store.read(lba, bytes).map_err(read_failed)
}

const fn read_failed(source: io::Error) -> LogError {
    let what = "read metadata";
    LogError::Io { what, source }
}

fn write<S: BlockStore>(
    store: &mut S,
    lba: Lba,
    bytes: &[u8],
    what: &'static str,
) -> Result<(), LogError> {
    store
        .write(lba, bytes)
        .map_err(|source| LogError::Io { what, source })
}

fn flush<S: BlockStore>(store: &mut S, what: &'static str) -> Result<(), LogError> {
    store
        .flush()
        .map_err(|source| LogError::Io { what, source })
}
