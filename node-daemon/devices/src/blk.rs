//! virtio-blk (virtio 1.2, 5.2): a block device on a virtual disk.
//!
//! Features: multi-queue, flush, block size, segment limit, read-only. Discard and write-zeroes are
//! not offered: disks on a volume are preallocated.
//!
//! Read next: [`crate::disk`], which performs the I/O.

mod config;
mod device;
mod metrics;
mod queue_handler;
mod state;

pub use config::{BlkConfig, Serial};
pub use device::{BlkDevice, BlkError};
pub use metrics::{BlkCounts, BlkMetrics};
