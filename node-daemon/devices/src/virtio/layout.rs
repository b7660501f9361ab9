//! The PCI layout of a virtio device: identity, capabilities, and BAR 0.
//!
//! BAR 0: `0x0000` common configuration, `0x1000` interrupt status, `0x2000` device configuration,
//! `0x3000` notifications (four bytes per queue), `0x4000` MSI-X table, `0x5000` pending bits.

use vm_memory::GuestAddress;

use crate::pci::{ConfigSpace, Identity, Msix};

/// The constants of a virtio device.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    /// Unique in the virtual machine; used in logs, metrics and error messages.
    pub(crate) name: String,
    /// [`crate::state::DeviceState::kind`]
    pub(crate) kind: &'static str,
    /// [`crate::state::DeviceState::version`]
    pub(crate) version: u32,
    /// The virtio device type (5).
    pub(crate) device_type: u16,
    /// PCI class, subclass and interface.
    pub(crate) class: [u8; 3],
    /// Features offered in addition to those of every device.
    pub(crate) features: u64,
    /// Those of which a restored device offers what the saved one did, whatever `features` says.
    pub(crate) features_of_state: u64,
    /// The largest size of each queue, a power of two.
    pub(crate) queue_sizes: Vec<u16>,
    /// The device-specific configuration.
    pub(crate) config: Vec<u8>,
}

/// The configuration space, with the registers at which the configuration access capability and the
/// MSI-X capability start.
pub(super) fn config_space(model: &Model, msix: &Msix) -> (ConfigSpace, u16, u16) {
    let mut space = ConfigSpace::new(&Identity {
        vendor: VENDOR,
        device: FIRST_MODERN_DEVICE + model.device_type,
        revision: 1,
        class: model.class,
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    });
    space.add_memory_bar(0, 0x8000);
    let queues = to_u32(model.queue_sizes.len());
    let multiplier = to_u32(usize::try_from(NOTIFY_MULTIPLIER).unwrap_or(0));
    let config_bytes = to_u32(model.config.len());
    space.add_capability(VENDOR_CAPABILITY, &window(1, 0, 0x38));
    let mut notify = window(2, NOTIFY_AT, queues * multiplier);
    notify[0] += 4;
    notify.extend(multiplier.to_le_bytes());
    space.add_capability(VENDOR_CAPABILITY, &notify);
    space.add_capability(VENDOR_CAPABILITY, &window(3, ISR_AT, 1));
    // Drivers refuse an empty structure, and a device without configuration needs none.
    if config_bytes > 0 {
        space.add_capability(VENDOR_CAPABILITY, &window(4, CONFIG_AT, config_bytes));
    }
    let mut access = window(5, 0, 0);
    access[0] += 4;
    access.extend([0; 4]);
    let access = space.add_capability(VENDOR_CAPABILITY, &access);
    // The driver writes bar, offset, length and data of the configuration access capability.
    space.allow(access + 4, &[0xFF]);
    space.allow(access + 8, &[0xFF; 12]);
    let table = to_u32(usize::try_from(TABLE_AT).unwrap_or(0));
    let pba = to_u32(usize::try_from(PBA_AT).unwrap_or(0));
    let msix = space.add_capability(MSIX_CAPABILITY, &msix.capability(0, table, pba));
    space.allow(msix + 2, &0xC000_u16.to_le_bytes());
    let to_u16 = |at: usize| u16::try_from(at).unwrap_or(0);
    (space, to_u16(access), to_u16(msix))
}

/// The body of a virtio capability after its id and link (4.1.4): length, type, BAR 0, id, padding,
/// offset and length of the structure.
fn window(kind: u8, offset: u64, length: u32) -> Vec<u8> {
    let mut body = vec![16, kind, 0, 0, 0, 0];
    body.extend(u32::try_from(offset).unwrap_or(0).to_le_bytes());
    body.extend(length.to_le_bytes());
    body
}

pub(super) fn notify_address(bar: GuestAddress, queue: usize) -> GuestAddress {
    let queue = u64::try_from(queue).unwrap_or(0);
    GuestAddress(bar.0 + NOTIFY_AT + queue * NOTIFY_MULTIPLIER)
}

fn to_u32(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

pub(super) const ISR_AT: u64 = 0x1000;
pub(super) const CONFIG_AT: u64 = 0x2000;
pub(super) const NOTIFY_AT: u64 = 0x3000;
pub(super) const TABLE_AT: u64 = 0x4000;
pub(super) const PBA_AT: u64 = 0x5000;
pub(super) const BAR_BYTES: u64 = 0x8000;
pub(super) const NOTIFY_MULTIPLIER: u64 = 4;
const VENDOR: u16 = 0x1AF4;
const FIRST_MODERN_DEVICE: u16 = 0x1040;
const SUBSYSTEM: u16 = 0x40;
const VENDOR_CAPABILITY: u8 = 0x09;
const MSIX_CAPABILITY: u8 = 0x11;
/// The data field of the configuration access capability.
pub(super) const ACCESS_DATA: u16 = 16;
