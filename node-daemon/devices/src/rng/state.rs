//! The saved state of an entropy device: nothing beyond its registers and queue.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// [`crate::state::DeviceState::kind`]
pub(super) const KIND: &str = "virtio-rng";
/// [`crate::state::DeviceState::version`]. 1: the first layout.
pub(super) const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct RngState {}

impl RngState {
    pub(super) fn to_value(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    pub(super) fn from_value(value: &Value) -> Result<Self, String> {
        Self::deserialize(value).map_err(|error| error.to_string())
    }
}
