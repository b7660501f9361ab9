//! The backend of a disk: an open device or file, the extents of the disk on it, and its write gate.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bascule_types::{Bytes, ExtentRun};

use super::errors::ErrorPolicy;
use super::extent::{ExtentError, ExtentMap};
use super::gate::WriteGate;
use super::geometry::block_bytes_of;

/// The backend of one virtual disk.
#[derive(Debug)]
pub struct Disk {
    /// The device or file, opened for reading and writing, with `O_DIRECT` where the file system
    /// supports it.
    pub file: OwnedFd,
    /// Maps bytes of the disk to bytes of the file.
    pub extents: ExtentMap,
    /// The unit of I/O on the file: offsets, lengths and memory addresses are multiples of it. A
    /// power of two from 512 to 4096 ([`block_bytes_of`] finds it).
    pub block_bytes: u32,
    /// Checked right before every write is submitted.
    pub gate: Arc<dyn WriteGate>,
    /// Where on the file a block can be read as long as the device is there at all: its first block, unless said
    /// otherwise.
    pub probe_offset: u64,
    /// What a failed read or write does. By default the guest gets the error.
    pub errors: Arc<ErrorPolicy>,
    /// For how long a write that failed may still land, in the volume's superblock.
    pub settle: Duration,
}

impl Disk {
    /// A disk of `size` bytes on `runs` of an opened volume or file.
    ///
    /// # Errors
    /// When the runs are too short for `size` in whole blocks, or the file's unit of I/O is not
    /// supported.
    pub fn new(
        file: OwnedFd,
        runs: &[ExtentRun],
        size: Bytes,
        gate: Arc<dyn WriteGate>,
    ) -> Result<Self, ExtentError> {
        let block_bytes =
            block_bytes_of(&file).map_err(|source| ExtentError::Geometry { source })?;
        let extents = ExtentMap::new(runs, size)?;
        if extents.reach_bytes() < size.0.next_multiple_of(block_bytes.into()) {
            return Err(ExtentError::NotWholeBlocks { size, block_bytes });
        }
        Ok(Self {
            extents,
            file,
            block_bytes,
            gate,
            probe_offset: 0,
            errors: Arc::default(),
            settle: SETTLE_DEFAULT,
        })
    }

    /// The same disk with this policy.
    #[must_use]
    pub fn with_errors(self, errors: Arc<ErrorPolicy>) -> Self {
        Self { errors, ..self }
    }

    /// The same disk with this settle time.
    #[must_use]
    pub fn with_settle(self, settle: Duration) -> Self {
        Self { settle, ..self }
    }
}

/// The settle time of a volume that is formatted without another one.
pub const SETTLE_DEFAULT: Duration = Duration::from_secs(4);
