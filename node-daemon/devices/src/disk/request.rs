//! Requests on a disk and their completions, as the virtio-blk device sees them.

use std::io;

use super::steps::step;
use crate::virtio::Segments;

/// A request on a disk.
#[derive(Clone, Debug)]
pub struct DiskRequest {
    /// Chosen by the caller; returned in [`Completion::tag`].
    pub tag: u64,
    /// Read, write or flush.
    pub operation: Operation,
}

/// What to do on a disk. Offsets are in bytes from the start of the disk and, like lengths, whole
/// sectors of 512 bytes; data is guest memory.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Operation {
    /// Copies from the disk at `offset` to guest memory.
    Read {
        /// The first byte on the disk.
        offset: u64,
        data: Segments,
    },
    /// Copies from guest memory to the disk at `offset`.
    Write {
        /// The first byte on the disk.
        offset: u64,
        data: Segments,
        /// Completes only when the data would survive a power cut (`RWF_DSYNC`).
        durable: bool,
    },
    /// Makes every write durable that was enqueued before this request.
    Flush,
}

/// The result of one [`DiskRequest`].
#[derive(Debug)]
pub struct Completion {
    /// [`DiskRequest::tag`].
    pub tag: u64,
    /// The first error of the request, if any.
    pub result: io::Result<()>,
}

impl DiskRequest {
    /// Offset and length in bytes.
    pub(super) fn range(&self) -> (u64, u64) {
        match &self.operation {
            Operation::Read { offset, data } | Operation::Write { offset, data, .. } => {
                step(data.as_slice().len());
                let length = u64::try_from(data.length_bytes());
                (*offset, length.unwrap_or(u64::MAX))
            }
            Operation::Flush => (0, 0),
        }
    }
}
