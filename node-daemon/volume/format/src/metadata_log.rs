//! The journal of one coordinator epoch, and the checkpoints that it follows.
//!
//! # States
//! ```text
//!            ┌──────── recover ────────┐          start            commit, checkpoint ⟲
//!  any state │ newest checkpoint,      │ Recovered ─────► Log ◄────────────
//!            │ then its journal        │      checkpoint in the own        failed write or flush:
//!            └─────────────────────────┘      area that is not its base    the Log refuses more
//! ```
//!
//! # Ordering
//! - A coordinator makes its leader block durable, then recovers, then starts its own log with a
//!   checkpoint, then answers. Records that a deposed coordinator still appends to its own journal
//!   are therefore never read once its successor has answered a request.
//! - Rows are flushed before the head that makes them count. A group of records is flushed before
//!   its requests are answered, and the next group is written after that. So a hole in the journal
//!   with a later group behind it is damage, not the effect of a crash.
//! - A group holds the records of all requests that waited when it was begun. It takes effect as a whole or
//!   not at all, so a request in it may build on one before it.
//! - A group begins a block of its own: a durable block is never written again.
//! - A checkpoint goes to the area of this slot that is not the base of what was recovered, after a
//!   flush has made that base durable: the base is not overwritten while it may still be needed.
//! - An area with a failed write is not written again before the node was reset: that write may still
//!   land, on top of a later record.
//!
//! # Costs
//! A group of n records is one write of n/8 blocks, rounded up, and one flush. A checkpoint of r rows is a
//! write of r/8 blocks, one of the head, and two flushes. It is due when the journal, a quarter of the area, has
//! no room for the largest group, and is written between two groups: no requester of a group waits for it.

use std::collections::BTreeSet;

use bascule_types::{Lba, SlotId};

use crate::area_blocks::{CheckpointHead, CheckpointId, CheckpointRow, JournalBlock};
use crate::block_store::BlockStore;
use crate::election_blocks::CoordinatorEpoch;
use crate::envelope::{BLOCK_BYTES, RECORD_BYTES, seal, seal_block};
use crate::metadata::Metadata;
use crate::metadata_records::MetaRecord;
use crate::recovery::{GROUP_MAX, LogError, Recovered};
use crate::superblock::Superblock;
use crate::volume_layout::{AreaId, RECORDS_PER_BLOCK, SlotPart};

/// The journal of one coordinator.
#[derive(Debug)]
pub struct Log {
    superblock: Superblock,
    area: AreaId,
    id: CheckpointId,
    /// The journal block at which the next group begins.
    next: u64,
    /// The checkpoint before this one, and where its journal ended.
    follows: Option<(CheckpointId, u64)>,
    /// Whether a failed write may still land in the half with this index.
    barred: [bool; 2],
    failed: bool,
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
            follows: Some((recovered.base, recovered.journaled)),
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

    /// Makes a group of records durable, with one flush: as a whole or not at all.
    ///
    /// # Errors
    /// [`LogError`]. Whether the group is durable is then unknown, and the log refuses further ones
    /// (sticky failure).
    pub fn commit<S: BlockStore>(
        &mut self,
        store: &mut S,
        group: &[MetaRecord],
    ) -> Result<(), LogError> {
        if self.failed {
            return Err(LogError::Failed);
        }
        if group.is_empty() {
            return Ok(());
        }
        // Cleared at the end, so that every early return leaves the log failed.
        self.failed = true;
        if group.len() > GROUP_MAX || !self.has_room(group.len()) {
            return Err(LogError::TooLarge);
        }
        self.append(store, group)?;
        self.failed = false;
        Ok(())
    }

    /// Goes on behind a checkpoint of `metadata` in the other half when the journal may have no room for the next
    /// group. `metadata` are the rows with every committed group applied, and no other. Called between two
    /// groups, when the requesters of the earlier one have their answers.
    ///
    /// # Errors
    /// As [`Log::commit`]. What was committed is durable all the same.
    pub fn checkpoint_if_due<S: BlockStore>(
        &mut self,
        store: &mut S,
        metadata: &Metadata,
    ) -> Result<(), LogError> {
        if self.failed {
            return Err(LogError::Failed);
        }
        if self.has_room(GROUP_MAX) {
            return Ok(());
        }
        self.failed = true;
        let half = 1 - self.area.half;
        if self.barred[usize::from(half)] {
            let slot = self.area.slot;
            return Err(LogError::Barred { slot, half });
        }
        self.area = AreaId { half, ..self.area };
        self.follows = Some((self.id, self.next));
        self.id.number += 1;
        self.next = 0;
        self.write_checkpoint(store, metadata)?;
        self.failed = false;
        Ok(())
    }

    fn has_room(&self, records: usize) -> bool {
        let blocks = (records * RECORD_BYTES).div_ceil(BLOCK_BYTES) as u64;
        self.next + blocks <= self.superblock.area(self.area).journal_blocks
    }

    fn append<S: BlockStore>(
        &mut self,
        store: &mut S,
        records: &[MetaRecord],
    ) -> Result<(), LogError> {
        let area = self.superblock.area(self.area);
        let first = Lba(area.journal.0 + self.next);
        let mut bytes = Vec::new();
        for (position, record) in (0_u8..).zip(records) {
            let sequence = self.next * RECORDS_PER_BLOCK + u64::from(position);
            let block = JournalBlock {
                id: self.id,
                sequence,
                position,
                more: usize::from(position) + 1 < records.len(),
                record: record.clone(),
            };
            let lba = Lba(area.journal.0 + sequence / RECORDS_PER_BLOCK);
            bytes.extend_from_slice(&seal(&block, self.superblock.place(lba)));
        }
        bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        self.next += (bytes.len() / BLOCK_BYTES) as u64;
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
        let (mut crc, mut at) = (0, area.rows);
        let mut bytes = Vec::with_capacity(ROWS_BYTES);
        for (index, record) in (0_u64..).zip(metadata.rows()) {
            let lba = Lba(area.rows.0 + index / RECORDS_PER_BLOCK);
            let row = CheckpointRow {
                id: self.id,
                index,
                record,
            };
            let record = seal(&row, self.superblock.place(lba));
            crc = crc32c::crc32c_append(crc, &record);
            bytes.extend_from_slice(&record);
            if bytes.len() == ROWS_BYTES {
                write(store, at, &bytes, "write the checkpoint records")?;
                at = Lba(at.0 + (ROWS_BYTES / BLOCK_BYTES) as u64);
                bytes.clear();
            }
        }
        bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        if !bytes.is_empty() {
            write(store, at, &bytes, "write the checkpoint records")?;
        }
        flush(store, "flush the checkpoint records")?;
        let head = CheckpointHead {
            id: self.id,
            rows,
            crc32c: crc,
            follows: self.follows,
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
            follows: None,
            barred: [false; 2],
            failed: false,
        };
        log.write_checkpoint(store, metadata)
    }
}

/// Checkpoint rows that one write takes: 1 MiB (a guess), which bounds the memory that a checkpoint needs.
const ROWS_BYTES: usize = 1 << 20;

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
