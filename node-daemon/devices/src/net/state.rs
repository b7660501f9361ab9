//! The saved state of a network device beyond its registers and queues.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::config::MacAddress;

/// [`crate::state::DeviceState::kind`]
pub(super) const KIND: &str = "virtio-net";
/// [`crate::state::DeviceState::version`]. 1: the first layout.
pub(super) const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NetState {
    /// The destination's device must have the same address.
    pub(super) mac: MacAddress,
    /// The `status` field of the configuration: `VIRTIO_NET_S_LINK_UP` and `VIRTIO_NET_S_ANNOUNCE`.
    pub(super) status: u16,
    /// IPv4 addresses of the guest, learned from its ARP packets; the destination announces them.
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
