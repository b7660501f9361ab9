//! PCI: finding the virtio devices, and a transport that notifies a queue by one write.

use virtio_drivers::transport::pci::bus::{
    BarInfo, Command, ConfigurationAccess, DeviceFunction, PciRoot,
};
use virtio_drivers::transport::pci::{PciTransport, virtio_device_type};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{PhysAddr, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::hal::Identity;
use crate::port;

/// PCI configuration space, by ports (mechanism #1) or in memory (PCI Express).
#[derive(Clone, Copy, Debug)]
pub(crate) enum Config {
    Ports,
    Memory(u64),
}

impl Config {
    fn pointer(base: u64, function: DeviceFunction, offset: u8) -> *mut u32 {
        let address = base
            | u64::from(function.bus) << 20
            | u64::from(function.device) << 15
            | u64::from(function.function) << 12
            | u64::from(offset);
        address as usize as *mut u32
    }

    fn select(function: DeviceFunction, offset: u8) {
        let address = 0x8000_0000
            | u32::from(function.bus) << 16
            | u32::from(function.device) << 11
            | u32::from(function.function) << 8
            | u32::from(offset & 0xfc);
        port::write32(CONFIG_ADDRESS, address);
    }
}

impl ConfigurationAccess for Config {
    fn read_word(&self, function: DeviceFunction, offset: u8) -> u32 {
        match *self {
            Self::Ports => {
                Self::select(function, offset);
                port::read32(CONFIG_DATA)
            }
            // SAFETY: the command line says that configuration space is there; it is mapped.
            Self::Memory(base) => unsafe { Self::pointer(base, function, offset).read_volatile() },
        }
    }

    fn write_word(&mut self, function: DeviceFunction, offset: u8, data: u32) {
        match *self {
            Self::Ports => {
                Self::select(function, offset);
                port::write32(CONFIG_DATA, data);
            }
            // SAFETY: as in `read_word`.
            Self::Memory(base) => unsafe {
                Self::pointer(base, function, offset).write_volatile(data);
            },
        }
    }

    unsafe fn unsafe_clone(&self) -> Self {
        *self
    }
}

/// The virtio devices that the guest uses.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) nic: Option<QueueTransport>,
    pub(crate) disk: Option<QueueTransport>,
    pub(crate) agent: Option<QueueTransport>,
    /// Virtio functions on bus 0, of whatever kind.
    pub(crate) devices: u64,
}

/// Looks for devices on bus 0 and makes the first of each kind ready.
pub(crate) fn find(config: Config) -> Found {
    let mut root = PciRoot::new(config);
    let mut found = Found::default();
    let mut bars = BarAllocator {
        next: OWN_BARS_START,
    };
    for (function, info) in PciRoot::new(config).enumerate_bus(0) {
        let Some(kind) = virtio_device_type(&info) else {
            continue;
        };
        found.devices += 1;
        let place = match kind {
            DeviceType::Network => &mut found.nic,
            DeviceType::Block => &mut found.disk,
            DeviceType::Console => &mut found.agent,
            _ => continue,
        };
        if place.is_none() {
            bars.assign_missing(&mut root, function);
            root.set_command(function, Command::MEMORY_SPACE | Command::BUS_MASTER);
            *place = QueueTransport::new(config, &mut root, function);
        }
    }
    found
}

/// Gives an address to memory BARs that firmware left without one or put where this guest's page
/// tables do not reach.
struct BarAllocator {
    next: u64,
}

impl BarAllocator {
    fn assign_missing(&mut self, root: &mut PciRoot<Config>, function: DeviceFunction) {
        let mut index = 0;
        while index < 6 {
            let bar = root.bar_info(function, index).ok().flatten();
            if let Some(BarInfo::Memory { address, size, .. }) = bar
                && size > 0
                && (address == 0 || address + size > MAPPED_BYTES)
            {
                self.next = self.next.next_multiple_of(size);
                if bar.as_ref().is_some_and(BarInfo::takes_two_entries) {
                    root.set_bar_64(function, index, self.next);
                } else {
                    root.set_bar_32(function, index, self.next as u32);
                }
                self.next += size;
            }
            index += if bar.is_some_and(|bar| bar.takes_two_entries()) {
                2
            } else {
                1
            };
        }
    }
}

/// [`PciTransport`] selects a queue and reads its notify offset before each notification: two exits
/// more than needed, each of which costs more than the work itself. This one looks them up once.
#[derive(Debug)]
pub(crate) struct QueueTransport {
    inner: PciTransport,
    notify: [*mut u16; QUEUES_MAX],
}

impl QueueTransport {
    fn new(config: Config, root: &mut PciRoot<Config>, function: DeviceFunction) -> Option<Self> {
        let common = region(config, root, function, CAP_COMMON)?;
        let notify = region(config, root, function, CAP_NOTIFY)?;
        let inner = PciTransport::new::<Identity, _>(root, function).ok()?;
        let mut pointers = [core::ptr::null_mut(); QUEUES_MAX];
        for (queue, pointer) in (0..).zip(&mut pointers) {
            let select = (common.address + COMMON_QUEUE_SELECT) as usize as *mut u16;
            // SAFETY: the capability says that the device's common configuration is there.
            unsafe { select.write_volatile(queue) };
            let offset = (common.address + COMMON_QUEUE_NOTIFY_OFF) as usize as *const u16;
            // SAFETY: as above.
            let offset = unsafe { offset.read_volatile() };
            let address = notify.address + u64::from(offset) * u64::from(notify.multiplier);
            *pointer = address as usize as *mut u16;
        }
        Some(Self {
            inner,
            notify: pointers,
        })
    }
}

impl Transport for QueueTransport {
    fn device_type(&self) -> DeviceType {
        self.inner.device_type()
    }
    fn read_device_features(&mut self) -> u64 {
        self.inner.read_device_features()
    }
    fn write_driver_features(&mut self, features: u64) {
        self.inner.write_driver_features(features);
    }
    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.inner.max_queue_size(queue)
    }
    fn notify(&mut self, queue: u16) {
        // SAFETY: the pointer comes from the device's notify capability.
        unsafe { self.notify[usize::from(queue)].write_volatile(queue) };
    }
    fn get_status(&self) -> DeviceStatus {
        self.inner.get_status()
    }
    fn set_status(&mut self, status: DeviceStatus) {
        self.inner.set_status(status);
    }
    fn set_guest_page_size(&mut self, size: u32) {
        self.inner.set_guest_page_size(size);
    }
    fn requires_legacy_layout(&self) -> bool {
        self.inner.requires_legacy_layout()
    }
    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver: PhysAddr,
        device: PhysAddr,
    ) {
        self.inner
            .queue_set(queue, size, descriptors, driver, device);
    }
    fn queue_unset(&mut self, queue: u16) {
        self.inner.queue_unset(queue);
    }
    fn queue_used(&mut self, queue: u16) -> bool {
        self.inner.queue_used(queue)
    }
    fn ack_interrupt(&mut self) -> InterruptStatus {
        self.inner.ack_interrupt()
    }
    fn read_config_generation(&self) -> u32 {
        self.inner.read_config_generation()
    }
    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        self.inner.read_config_space(offset)
    }
    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> Result<()> {
        self.inner.write_config_space(offset, value)
    }
}

struct Region {
    address: u64,
    multiplier: u32,
}

/// Where the structure of a virtio PCI capability lies (virtio 1.2, 4.1.4).
fn region(
    config: Config,
    root: &mut PciRoot<Config>,
    function: DeviceFunction,
    wanted: u8,
) -> Option<Region> {
    let capability = PciRoot::new(config)
        .capabilities(function)
        .find(|capability| {
            capability.id == CAP_VENDOR && (capability.private_header >> 8) as u8 == wanted
        })?;
    let read = |offset: u8| config.read_word(function, capability.offset + offset);
    let bar = root.bar_info(function, read(4) as u8).ok().flatten()?;
    let (base, _) = bar.memory_address_size()?;
    let multiplier = if wanted == CAP_NOTIFY { read(16) } else { 0 };
    Some(Region {
        address: base + u64::from(read(8)),
        multiplier,
    })
}

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const CAP_VENDOR: u8 = 9;
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const COMMON_QUEUE_SELECT: u64 = 22;
const COMMON_QUEUE_NOTIFY_OFF: u64 = 30;
/// The guest uses queues 0 and 1 of most devices, and up to queue 5 of a console.
const QUEUES_MAX: usize = 6;
const MAPPED_BYTES: u64 = 4 << 30;
/// Within every machine's 32-bit window, above where firmware starts to assign.
const OWN_BARS_START: u64 = 0xd800_0000;
