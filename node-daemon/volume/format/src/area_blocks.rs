//! The blocks of a metadata area: a checkpoint's head and rows, and the journal that follows the
//! checkpoint. Only the slot's node writes its areas, while it is the coordinator. Every node reads
//! them to recover the rows, and uses the area whose head has the highest checkpoint id.
//!
//! ```text
//! block    offset size  field                     (header epoch: the coordinator epoch)
//! head         48    8  number of the checkpoint, from 1, rises within a coordinator epoch
//!              56    8  number of rows
//!              64    4  CRC32C over the 512-byte records of all rows, in order
//!              68    4  1 = the next three fields are present
//!              72   16  the checkpoint before: coordinator epoch, number
//!              88    8  blocks of its journal that this checkpoint includes
//! row          48    8  number of the checkpoint
//!              56    8  index of the row, from 0
//!              64  443  row (see `metadata_records`), zero to its end
//! journal      48    8  number of the checkpoint that the journal follows
//!              56    8  sequence: the record lies `sequence` records of 512 bytes into the journal
//!              64    1  position in its group, from 0
//!              65    1  1 = the group goes on in the next record
//!              66  443  row
//! ```
//! Checkpoint rows and journal records lie eight to a block; each is a sealed record, and its address is the
//! block's. A group begins a block; what it leaves of its last block is zero.

use crate::election_blocks::CoordinatorEpoch;
use crate::envelope::{BodyReader, BodyWriter, FormatError, Kind, Record};
use crate::metadata_records::MetaRecord;

/// Identifies a checkpoint. Ordered by coordinator epoch, then number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CheckpointId {
    /// The epoch of the coordinator that wrote the checkpoint.
    pub epoch: CoordinatorEpoch,
    /// The number within the epoch, from 1.
    pub number: u64,
}

/// The head of a checkpoint. Written after the rows are durable: an undamaged head says that the
/// checkpoint is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct CheckpointHead {
    pub id: CheckpointId,
    /// The number of rows.
    pub rows: u64,
    /// CRC32C over the 512-byte records of all rows, in order.
    pub crc32c: u32,
    /// The checkpoint before, and how many blocks of its journal this one includes: who has applied exactly
    /// these has the rows of this one. None of a volume's first checkpoint, and of a repaired head.
    pub follows: Option<(CheckpointId, u64)>,
}

/// One row of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct CheckpointRow {
    pub id: CheckpointId,
    /// The row's index in the checkpoint, from 0.
    pub index: u64,
    pub record: MetaRecord,
}

/// One record of a journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalBlock {
    /// The checkpoint that the journal follows.
    pub id: CheckpointId,
    /// The record's position in the journal, from 0, counting the room that earlier groups left unused.
    pub sequence: u64,
    /// The record's position in its group, from 0. A group takes effect as a whole or not at all.
    pub position: u8,
    /// Whether the group goes on in the next record.
    pub more: bool,
    /// The change to the rows.
    pub record: MetaRecord,
}

impl JournalBlock {
    /// The sequence number of the group's first record.
    #[must_use]
    pub fn group(&self) -> u64 {
        self.sequence.saturating_sub(self.position.into())
    }
}

impl Record for CheckpointHead {
    const KIND: Kind = Kind::CheckpointHead;

    fn epoch(&self) -> u64 {
        self.id.epoch.0
    }

    fn encode(&self, body: &mut BodyWriter<'_>) {
        body.u64(self.id.number);
        body.u64(self.rows);
        body.u32(self.crc32c);
        body.u32(self.follows.is_some().into());
        let (before, blocks) = self.follows.unwrap_or_default();
        body.u64(before.epoch.0);
        body.u64(before.number);
        body.u64(blocks);
    }

    fn parse(epoch: u64, body: &mut BodyReader<'_>) -> Result<Self, FormatError> {
        let (id, rows, crc32c) = (parse_id(epoch, body), body.u64(), body.u32());
        let has_one = body.u32();
        let before = parse_id(body.u64(), body);
        let blocks = body.u64();
        let follows = match has_one {
            0 => None,
            1 => Some((before, blocks)),
            _ => return Err(FormatError::Field("checkpoint before")),
        };
        Ok(Self {
            id,
            rows,
            crc32c,
            follows,
        })
    }
}

impl Record for CheckpointRow {
    const KIND: Kind = Kind::CheckpointRow;

    fn epoch(&self) -> u64 {
        self.id.epoch.0
    }

    fn encode(&self, body: &mut BodyWriter<'_>) {
        body.u64(self.id.number);
        body.u64(self.index);
        self.record.encode(body);
    }

    fn parse(epoch: u64, body: &mut BodyReader<'_>) -> Result<Self, FormatError> {
        Ok(Self {
            id: parse_id(epoch, body),
            index: body.u64(),
            record: MetaRecord::parse(body)?,
        })
    }
}

impl Record for JournalBlock {
    const KIND: Kind = Kind::Journal;

    fn epoch(&self) -> u64 {
        self.id.epoch.0
    }

    fn encode(&self, body: &mut BodyWriter<'_>) {
        body.u64(self.id.number);
        body.u64(self.sequence);
        body.u8(self.position);
        body.u8(u8::from(self.more));
        self.record.encode(body);
    }

    fn parse(epoch: u64, body: &mut BodyReader<'_>) -> Result<Self, FormatError> {
        Ok(Self {
            id: parse_id(epoch, body),
            sequence: body.u64(),
            position: body.u8(),
            more: body.flag("more")?,
            record: MetaRecord::parse(body)?,
        })
    }
}

fn parse_id(epoch: u64, body: &mut BodyReader<'_>) -> CheckpointId {
    CheckpointId {
        epoch: CoordinatorEpoch(epoch),
        number: body.u64(),
    }
}
