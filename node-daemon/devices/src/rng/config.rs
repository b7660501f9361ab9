//! The parameters of an entropy device.

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use crate::virtio::constants::to_u16;

/// The parameters of an entropy device.
#[derive(Clone, Debug)]
pub struct RngConfig {
    /// Unique in the virtual machine, such as `rng0`; used in logs, metrics and saved states.
    pub name: String,
}

/// The virtio device type (5).
pub(super) const DEVICE_TYPE: u16 = to_u16(VIRTIO_ID_RNG);
/// PCI class: not one of the defined classes.
pub(super) const CLASS: [u8; 3] = [0xFF, 0, 0];
/// Drivers keep one request in flight, so a larger queue has no use.
pub(super) const QUEUE_SIZE: u16 = 64;
