//! The PCI functions of bus 0, found by their configuration space, with the registers of virtio devices.

use super::access;
use super::queue::Ring;
use crate::port;

/// One function.
#[derive(Debug)]
pub(super) struct Function {
    /// Its device number.
    pub(super) device: u8,
    /// The virtio device type; 0 for another function.
    pub(super) kind: u16,
    /// Where BAR 0 is after a reset; 0 for none.
    pub(super) bar: u64,
    /// The register at which the MSI-X capability starts; 0 for none.
    pub(super) msix: u8,
    /// The offset of the MSI-X table in BAR 0.
    pub(super) table: u64,
    /// Addresses of the common configuration and of the device-specific one.
    pub(super) common: u64,
    pub(super) config: u64,
    notify: u64,
    multiplier: u64,
    /// The queues as this guest has last configured them.
    pub(super) rings: [Option<Ring>; QUEUES_MAX],
}

/// All functions, of bus 0.
pub(super) fn find() -> [Option<Function>; FUNCTIONS_MAX] {
    let mut next = 0..DEVICES;
    core::array::from_fn(|_| next.by_ref().find_map(Function::at))
}

impl Function {
    fn at(device: u8) -> Option<Self> {
        let identity = config_read(device, 0);
        if identity == u32::MAX {
            return None;
        }
        let is_virtio = identity & 0xffff == VIRTIO_VENDOR;
        let mut function = Self {
            device,
            kind: if is_virtio {
                ((identity >> 16) as u16).wrapping_sub(FIRST_MODERN_DEVICE)
            } else {
                0
            },
            bar: u64::from(config_read(device, BAR_0) & !0xf),
            msix: 0,
            table: 0,
            common: 0,
            config: 0,
            notify: 0,
            multiplier: 0,
            rings: [const { None }; QUEUES_MAX],
        };
        function.read_capabilities();
        Some(function)
    }

    /// The virtio capabilities (virtio 1.2, 4.1.4) and MSI-X. All structures are in BAR 0.
    fn read_capabilities(&mut self) {
        let mut at = config_read(self.device, CAPABILITIES) as u8;
        for _ in 0..CAPABILITIES_MAX {
            if at == 0 {
                return;
            }
            let head = config_read(self.device, at);
            let place = self.bar + u64::from(config_read(self.device, at + 8));
            match (head as u8, (head >> 24) as u8) {
                (CAP_VENDOR, 1) => self.common = place,
                (CAP_VENDOR, 2) => {
                    self.notify = place;
                    self.multiplier = u64::from(config_read(self.device, at + 16));
                }
                (CAP_VENDOR, 4) => self.config = place,
                (CAP_MSIX, _) => {
                    self.msix = at;
                    self.table = u64::from(config_read(self.device, at + 4) & !7);
                }
                _ => {}
            }
            at = (head >> 8) as u8;
        }
    }

    /// Undoes what was done to BAR 0 and the command register.
    pub(super) fn repair(&self) {
        if self.bar != 0 {
            config_write(self.device, BAR_0, self.bar as u32);
            config_write(self.device, COMMAND, MEMORY_AND_BUS_MASTER);
        }
    }

    /// Where `queue` is notified.
    pub(super) fn notify_address(&self, queue: u16) -> u64 {
        self.notify + u64::from(queue) * self.multiplier
    }

    /// Whether a driver has set the device going.
    pub(super) fn is_running(&self) -> bool {
        access::read(self.common + STATUS, 1) & DRIVER_OK != 0
    }
}

/// Reads a register of a function of bus 0.
pub(super) fn config_read(device: u8, register: u8) -> u32 {
    select(device, register);
    port::read32(CONFIG_DATA)
}

/// Writes a register of a function of bus 0.
pub(super) fn config_write(device: u8, register: u8, value: u32) {
    select(device, register);
    port::write32(CONFIG_DATA, value);
}

/// Selects a register for the data ports.
pub(super) fn select(device: u8, register: u8) {
    let address = 0x8000_0000 | u32::from(device) << 11 | u32::from(register & 0xfc);
    port::write32(CONFIG_ADDRESS, address);
}

/// Types of virtio devices (virtio 1.2, 5).
pub(super) const NETWORK: u16 = 1;
pub(super) const BLOCK: u16 = 2;
pub(super) const CONSOLE: u16 = 3;
/// Registers of the common configuration (virtio 1.2, 4.1.4.3).
pub(super) const STATUS: u64 = 0x14;
pub(super) const DRIVER_OK: u64 = 4;
/// More functions than the machines of the tests have.
pub(super) const FUNCTIONS_MAX: usize = 10;
/// Queues of one device that are used: a console with two ports has six.
pub(super) const QUEUES_MAX: usize = 6;
pub(super) const CONFIG_ADDRESS: u16 = 0xcf8;
pub(super) const CONFIG_DATA: u16 = 0xcfc;
pub(super) const COMMAND: u8 = 4;
pub(super) const BAR_0: u8 = 0x10;
const CAPABILITIES: u8 = 0x34;
const MEMORY_AND_BUS_MASTER: u32 = 6;
const DEVICES: u8 = 32;
const CAPABILITIES_MAX: u32 = 16;
const VIRTIO_VENDOR: u32 = 0x1af4;
const FIRST_MODERN_DEVICE: u16 = 0x1040;
const CAP_VENDOR: u8 = 9;
const CAP_MSIX: u8 = 0x11;
