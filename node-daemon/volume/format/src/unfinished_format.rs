//! The block that takes the place of both superblocks while a device is being formatted.
//!
//! ```text
//! offset size  field
//!     48    4  settle time of the new volume in milliseconds, at most one hour
//! ```
//! Written by `format` before anything else; each copy is replaced by a superblock at its end. So a device that
//! has one was formatted in part, or a copy of its superblock could not be written: a write of that `format`
//! may have failed, and may still land, on whatever another `format` has written since.

use std::io;
use std::time::Duration;

use crate::block_store::BlockStore;
use crate::envelope::{
    BLOCK_BYTES, BodyReader, BodyWriter, FormatError, Kind, Record, open_envelope,
};
use crate::superblock_copies::possible_copies;

/// A `format` that has begun and not finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnfinishedFormat {
    /// The settle time of the new volume.
    pub settle: Duration,
}

impl Record for UnfinishedFormat {
    const KIND: Kind = Kind::UnfinishedFormat;

    fn epoch(&self) -> u64 {
        0
    }

    fn encode(&self, body: &mut BodyWriter<'_>) {
        body.u32(u32::try_from(self.settle.as_millis()).unwrap_or(u32::MAX));
    }

    fn parse(_: u64, body: &mut BodyReader<'_>) -> Result<Self, FormatError> {
        let settle = Duration::from_millis(body.u32().into());
        if settle > SETTLE_MAX {
            return Err(FormatError::Field("settle"));
        }
        Ok(Self { settle })
    }
}

/// Whether an earlier `format` of the device, of any volume, has not finished: with the longest settle time, if
/// there are two.
///
/// # Errors
/// The device's.
pub fn find_unfinished_format<S: BlockStore>(
    store: &mut S,
) -> io::Result<Option<UnfinishedFormat>> {
    let mut found: Option<UnfinishedFormat> = None;
    for lba in possible_copies(store)? {
        let mut block = [0; BLOCK_BYTES];
        match store.read(lba, &mut block) {
            Ok(()) => {}
            // Too small for a volume.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => continue,
            Err(error) => return Err(error),
        }
        let opened = open_envelope(&block, Kind::UnfinishedFormat);
        let parsed =
            opened.and_then(|(header, mut body)| UnfinishedFormat::parse(header.epoch, &mut body));
        let settle = found.map_or(Duration::ZERO, |found| found.settle);
        found = match parsed {
            Ok(here) => Some(UnfinishedFormat {
                settle: here.settle.max(settle),
            }),
            Err(_) => found,
        };
    }
    Ok(found)
}

/// As for the superblock.
const SETTLE_MAX: Duration = Duration::from_secs(3600);
