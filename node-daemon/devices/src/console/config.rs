//! The parameters of a console device, and its constants (virtio 1.2, 5.3).

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use crate::virtio::constants::{feature, to_u16};

/// The parameters of a console device.
#[derive(Clone, Debug)]
pub struct ConsoleConfig {
    /// Unique in the virtual machine, such as `agent0`; used in logs and saved states.
    pub name: String,
    /// The name of the port, by which the guest finds it: `/dev/virtio-ports/<name>` in Linux. At most 64 bytes.
    pub port: String,
}

/// The device-specific configuration (5.3.4): columns, rows, number of ports, emergency write.
pub(super) fn config_space() -> Vec<u8> {
    let mut space = vec![0; 4];
    space.extend(PORTS.to_le_bytes());
    space.extend([0; 4]);
    space
}

/// The virtio device type (5).
pub(super) const DEVICE_TYPE: u16 = to_u16(VIRTIO_ID_CONSOLE);
/// PCI class: communication controller, other.
pub(super) const CLASS: [u8; 3] = [0x07, 0x80, 0];
/// `VIRTIO_CONSOLE_F_MULTIPORT`: the device has named ports and control queues (5.3.3).
pub(super) const F_MULTIPORT: u64 = feature(1);
/// Ports with queues: number 0, which is not used, and [`PORT`].
const PORTS: u32 = 2;
/// The number of the port.
pub(super) const PORT: u32 = 1;
/// Of each port the queue to the guest and the one from it; the control queues follow those of port 0 (5.3.2).
pub(super) const QUEUE_SIZES: [u16; 6] = [64; 6];
pub(super) const CONTROL_TO_GUEST: usize = 2;
pub(super) const CONTROL_FROM_GUEST: usize = 3;
pub(super) const TO_GUEST: usize = 4;
pub(super) const FROM_GUEST: usize = 5;
/// Longest name of a port in bytes: drivers give a buffer of a page to each message, and one of 32 bytes at least.
pub(super) const PORT_NAME_BYTES_MAX: usize = 64;
