//! The blocks of a metadata area: a checkpoint's head and rows, and the journal that follows it.
//!
//! ```text
//! head     48    8  number of the checkpoint, rises within a coordinator epoch
//!          56    8  number of rows
//!          64    4  CRC32C over all rows' 512-byte records, in order
//! row      48    8  number of the checkpoint
//!          56    8  index of the row
//!          64       record (see `record`), at most 440 bytes
//! journal  48    8  number of the checkpoint that it follows
//!          56    8  sequence, from 0; its block is `sequence` blocks into the journal
//!          64    1  position in its group
//!          65    1  1 = the group goes on in the next block
//!          66       record
//! ```
//! The header's epoch is the coordinator epoch. Rows lie eight to a block, each a sealed record
//! whose address is its block's.

use crate::FormatError;
use crate::election_blocks::CoordinatorEpoch;
use crate::envelope::{BodyReader, BodyWriter, Kind, Record};
use crate::metadata_records::MetaRecord;

/// Which checkpoint: ordered by coordinator epoch, then number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CheckpointId {
    /// The coordinator that wrote it.
    pub epoch: CoordinatorEpoch,
    /// Its number within the epoch.
    pub number: u64,
}

/// "This area's checkpoint is complete": written last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointHead {
    /// Which.
    pub id: CheckpointId,
    /// How many rows it has.
    pub rows: u64,
    /// CRC32C over all of them.
    pub crc32c: u32,
}

/// One row of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointRow {
    /// Of which.
    pub id: CheckpointId,
    /// Its index.
    pub index: u64,
    /// The row.
    pub record: MetaRecord,
}

/// One record of a journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalBlock {
    /// The checkpoint that it follows.
    pub id: CheckpointId,
    /// Its place in the journal, from 0.
    pub sequence: u64,
    /// Its place in its group, from 0. A group takes effect as a whole or not at all.
    pub position: u8,
    /// Whether the group goes on.
    pub more: bool,
    /// The step.
    pub record: MetaRecord,
}

impl JournalBlock {
    /// The sequence number of the first block of its group.
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
    }

    fn parse(epoch: u64, body: &mut BodyReader<'_>) -> Result<Self, FormatError> {
        Ok(Self {
            id: parse_id(epoch, body),
            rows: body.u64(),
            crc32c: body.u32(),
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
