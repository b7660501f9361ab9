//! The data path of a virtual disk: requests on guest memory → extents of the volume → io_uring.
//!
//! [`Disk`] says what a disk is: an open device, where the disk's blocks lie on it, and the gate
//! that its writes must pass. [`DiskEngine`] performs requests on it. Nothing here knows virtio.
//!
//! # Guarantees
//! - Every write passes [`WriteGate::is_open`] right before the system call that submits it. While
//!   the gate is closed, writes wait; the guest sees no error. Reads do not wait.
//! - Writes that overlap, counted in whole device blocks, are performed one after the other, in the
//!   order of arrival. So a write of part of a block (read, merge, write) loses nobody's bytes.
//! - A flush is submitted after every write that arrived before it has completed.
//! - After a failed write or flush no further write is submitted (sticky-failed); reads go on.
//!
//! Read next: `engine` for the life of a request.

mod buffer;
mod engine;
mod extent;
mod gate;
mod geometry;
mod job;
mod ring;
mod slab;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bascule_types::{Bytes, ExtentRun};

pub use engine::{Completion, DiskEngine, DiskRequest, EngineView, Operation};
pub use extent::{ExtentError, ExtentMap};
pub use gate::{AlwaysOpen, VolumeGate, WriteGate};
pub use geometry::block_bytes_of;

/// A disk: where its bytes are, and who lets writes through.
#[derive(Debug)]
pub struct Disk {
    /// The device or file, opened for reading and writing, with `O_DIRECT` wherever it can be.
    pub file: OwnedFd,
    /// Where the disk's bytes lie in it.
    pub extents: ExtentMap,
    /// The unit of I/O on the file: offsets, lengths and memory addresses are multiples of it. A
    /// power of two from 512 to 4096 ([`block_bytes_of`] finds it).
    pub block_bytes: u32,
    /// What every write must pass.
    pub gate: Arc<dyn WriteGate>,
}

impl Disk {
    /// A disk on these runs of an opened volume or file.
    ///
    /// # Errors
    /// When the runs are too short for `size` in whole blocks, or the file's unit of I/O cannot be used.
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
        })
    }
}
