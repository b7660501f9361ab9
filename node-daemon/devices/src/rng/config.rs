//! How an entropy device is set up.

/// An entropy device.
#[derive(Clone, Debug)]
pub struct RngConfig {
    /// Its name, unique in the machine, such as `rng0`.
    pub name: String,
}

/// The virtio device type (5).
pub(super) const DEVICE_TYPE: u16 = 4;
/// PCI class: no class fits.
pub(super) const CLASS: [u8; 3] = [0xFF, 0, 0];
/// A driver keeps one request out; more room serves nothing.
pub(super) const QUEUE_SIZE: u16 = 64;
