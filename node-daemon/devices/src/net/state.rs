//! The saved state of a network device beyond its registers and queues.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::config::MacAddress;
use super::learned::{GuestIp, SavedAddress};

/// [`crate::state::DeviceState::kind`]
pub(super) const KIND: &str = "virtio-net";
/// [`crate::state::DeviceState::version`].
///
/// 1: the first layout. 2: the MTU that was offered to the guest, whose driver reads it only once; and
/// with each address its age and kind, in `learned` in place of `addresses`, without which a
/// destination would announce addresses that the guest no longer has. A state of version 1 is read:
/// no MTU was offered to its guest, and its addresses count as confirmed.
pub(super) const VERSION: u32 = 2;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NetState {
    /// The destination's device must have the same address.
    pub(super) mac: MacAddress,
    /// The `status` field of the configuration: `VIRTIO_NET_S_LINK_UP` and `VIRTIO_NET_S_ANNOUNCE`.
    pub(super) status: u16,
    /// The MTU in bytes that was offered to the guest when it was started (VIRTIO_NET_F_MTU).
    #[serde(default)]
    pub(super) mtu: Option<u16>,
    /// Of a state of version 1: IPv4 addresses of the guest.
    #[serde(default, skip_serializing)]
    pub(super) addresses: Vec<Ipv4Addr>,
    /// Addresses of the guest; the destination announces them.
    #[serde(default)]
    pub(super) learned: Vec<SavedAddress>,
}

impl NetState {
    pub(super) fn to_value(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    pub(super) fn from_value(value: &Value) -> Result<Self, String> {
        let mut state = Self::deserialize(value).map_err(|error| error.to_string())?;
        let first_version = state.addresses.drain(..).map(|address| SavedAddress {
            address: GuestIp {
                address: address.into(),
                router: false,
            },
            age_minutes: 0,
        });
        state.learned.extend(first_version);
        Ok(state)
    }
}
