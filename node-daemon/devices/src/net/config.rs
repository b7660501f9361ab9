//! The parameters of a network device, and its device-specific configuration (virtio 1.2, 5.1.4).

use std::fmt;
use std::mem::offset_of;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE,
    VIRTIO_NET_S_LINK_UP, virtio_net_config,
};

use crate::virtio::constants::{feature, to_u16};

/// An Ethernet address in transmission order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MacAddress(pub [u8; 6]);

/// The parameters of a network device.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// Unique in the virtual machine, such as `net0`; used in logs, metrics and saved states.
    pub name: String,
    /// The MAC address of the guest's interface.
    pub mac: MacAddress,
    /// The MTU of the network in bytes, which the device offers to the guest (VIRTIO_NET_F_MTU,
    /// 5.1.4.1: 68 to 65535); none when it is not known, and the guest uses its default.
    pub mtu: Option<u16>,
    /// Whether the state of a guest to which a larger MTU than `mtu` was offered is refused. The driver
    /// reads the field once, so the guest keeps its MTU, and its longest packets would be lost.
    pub refuses_larger_mtu: bool,
}

/// The text is not an Ethernet address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an Ethernet address: {text:?}; expected one such as 52:54:00:12:34:56")]
pub struct ParseMacError {
    text: String,
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || ParseMacError {
            text: text.to_owned(),
        };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2)
                .ok_or_else(refused)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| refused())?;
        }
        parts
            .next()
            .is_none()
            .then_some(Self(bytes))
            .ok_or_else(refused)
    }
}

/// The configuration structure up to `mtu`.
pub(super) fn config_space(config: &NetConfig) -> Vec<u8> {
    let mut space = config.mac.0.to_vec();
    space.extend(STATUS_LINK_UP.to_le_bytes());
    // One queue pair.
    space.extend(1_u16.to_le_bytes());
    space.extend(config.mtu.unwrap_or(0).to_le_bytes());
    space
}

/// Sets the `mtu` field.
pub(super) fn set_mtu(space: &mut [u8], mtu: u16) {
    if let Some(field) = space.get_mut(MTU_AT..MTU_AT + 2) {
        field.copy_from_slice(&mtu.to_le_bytes());
    }
}

/// Sets or clears a bit of the status field.
pub(super) fn set_status(space: &mut [u8], bit: u16, on: bool) {
    if let Some([low, high]) = space.get_mut(STATUS_AT..STATUS_AT + 2) {
        let status = u16::from_le_bytes([*low, *high]);
        let status = if on { status | bit } else { status & !bit };
        [*low, *high] = status.to_le_bytes();
    }
}

/// The virtio device type (5).
pub(super) const DEVICE_TYPE: u16 = to_u16(VIRTIO_ID_NET);
/// PCI class: network, Ethernet.
pub(super) const CLASS: [u8; 3] = [0x02, 0, 0];
pub(super) const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
pub(super) const CONTROL: usize = 2;
pub(super) const STATUS_AT: usize = offset_of!(virtio_net_config, status);
pub(super) const MTU_AT: usize = offset_of!(virtio_net_config, mtu);
pub(super) const STATUS_LINK_UP: u16 = to_u16(VIRTIO_NET_S_LINK_UP);
pub(super) const STATUS_ANNOUNCE: u16 = to_u16(VIRTIO_NET_S_ANNOUNCE);
pub(super) const F_CSUM: u64 = feature(VIRTIO_NET_F_CSUM);
pub(super) const F_GUEST_CSUM: u64 = feature(VIRTIO_NET_F_GUEST_CSUM);
pub(super) const F_MTU: u64 = feature(VIRTIO_NET_F_MTU);
pub(super) const F_MAC: u64 = feature(VIRTIO_NET_F_MAC);
pub(super) const F_GUEST_TSO4: u64 = feature(VIRTIO_NET_F_GUEST_TSO4);
pub(super) const F_GUEST_TSO6: u64 = feature(VIRTIO_NET_F_GUEST_TSO6);
pub(super) const F_GUEST_ECN: u64 = feature(VIRTIO_NET_F_GUEST_ECN);
pub(super) const F_HOST_TSO4: u64 = feature(VIRTIO_NET_F_HOST_TSO4);
pub(super) const F_HOST_TSO6: u64 = feature(VIRTIO_NET_F_HOST_TSO6);
pub(super) const F_HOST_ECN: u64 = feature(VIRTIO_NET_F_HOST_ECN);
pub(super) const F_MRG_RXBUF: u64 = feature(VIRTIO_NET_F_MRG_RXBUF);
pub(super) const F_STATUS: u64 = feature(VIRTIO_NET_F_STATUS);
pub(super) const F_CTRL_VQ: u64 = feature(VIRTIO_NET_F_CTRL_VQ);
pub(super) const F_GUEST_ANNOUNCE: u64 = feature(VIRTIO_NET_F_GUEST_ANNOUNCE);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_back_from_its_text() {
        let mac: MacAddress = "52:54:00:12:34:5a".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:12:34:5a");
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:5a:00",
            "5254:0:12:34:5a:1",
            "zz:54:00:12:34:5a",
        ] {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
    }
}
