//! What is saved of a block device beyond its queues.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The kind of its saved state.
pub(super) const KIND: &str = "virtio-blk";
/// 1: the first layout.
pub(super) const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BlkState {
    /// The disk's size: the destination's disk must have the same.
    pub(super) size_bytes: u64,
    /// The block size that the guest was told. The destination's device may have another one.
    pub(super) block_bytes: u32,
    /// Requests that were taken and not answered, because the gate was closed: the destination
    /// performs them anew, from the start. The guest still holds their descriptors unchanged.
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
