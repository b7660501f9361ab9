//! virtio-blk (virtio 1.2, 5.2): a disk of the volume as the guest sees it.
//!
//! Features: several queues, flush, block size, segment limit, read-only. Discard and write-zeroes
//! are not offered: the volume's disks are preallocated.
//!
//! Read next: [`crate::disk`], which does the I/O.

mod config;
mod device;
mod metrics;
mod queue_handler;
mod state;

pub use config::BlkConfig;
pub use device::{BlkDevice, BlkError};
pub use metrics::{BlkCounts, BlkMetrics};
