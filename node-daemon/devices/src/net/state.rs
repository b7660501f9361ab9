//! What is saved of a network device beyond its queues.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::config::MacAddress;

/// The kind of its saved state.
pub(super) const KIND: &str = "virtio-net";
/// 1: the first layout.
pub(super) const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NetState {
    /// The destination's device must have the same.
    pub(super) mac: MacAddress,
    /// The status field of the configuration: link up, announcement wanted.
    pub(super) status: u16,
    /// The guest's IPv4 addresses as far as they are known, to be announced.
    pub(super) addresses: Vec<Ipv4Addr>,
}

impl NetState {
    pub(super) fn to_value(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    pub(super) fn from_value(value: &Value) -> Result<Self, String> {
        Self::deserialize(value).map_err(|error| error.to_string())
    }
}
