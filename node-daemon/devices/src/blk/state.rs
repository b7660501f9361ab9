//! The saved state of a block device beyond its registers and queues.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// [`crate::state::DeviceState::kind`]
pub(super) const KIND: &str = "virtio-blk";
/// [`crate::state::DeviceState::version`]. 1: the first layout.
pub(super) const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BlkState {
    /// The size of the disk; the destination's disk must have the same.
    pub(super) size_bytes: u64,
    /// `blk_size` as the guest read it; kept even if the destination's device has another unit of I/O.
    pub(super) block_bytes: u32,
    /// Requests that were popped and not completed, because the write gate was closed. The
    /// destination reads their descriptors again, which the guest may not change, and performs the
    /// requests from the start.
    pub(super) unanswered: Vec<Unanswered>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Unanswered {
    pub(super) queue: usize,
    pub(super) head: u16,
}

impl BlkState {
    pub(super) fn to_value(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    pub(super) fn from_value(value: &Value) -> Result<Self, String> {
        Self::deserialize(value).map_err(|error| error.to_string())
    }
}
