//! Constants of the virtio specification in the width in which the devices use them.
//! `virtio-bindings` declares all of them as `u32`, and features as bit numbers.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// The mask of feature bit number `bit`.
pub(crate) const fn feature(bit: u32) -> u64 {
    1 << bit
}

/// A constant that fits into one byte.
pub(crate) const fn to_u8(value: u32) -> u8 {
    assert!(value <= 0xFF, "larger than a byte");
    let [byte, ..] = value.to_le_bytes();
    byte
}

/// A constant that fits into two bytes.
pub(crate) const fn to_u16(value: u32) -> u16 {
    assert!(value <= 0xFFFF, "larger than two bytes");
    let [low, high, ..] = value.to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// The MSI-X vector number that stands for "no interrupt" (`VIRTIO_MSI_NO_VECTOR`, 4.1.5.1.2).
pub(crate) const NO_VECTOR: u16 = 0xFFFF;
pub(crate) const F_INDIRECT_DESC: u64 = feature(VIRTIO_RING_F_INDIRECT_DESC);
pub(crate) const F_EVENT_IDX: u64 = feature(VIRTIO_RING_F_EVENT_IDX);
pub(crate) const F_VERSION_1: u64 = feature(VIRTIO_F_VERSION_1);
