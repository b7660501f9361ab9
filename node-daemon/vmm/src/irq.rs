//! Interrupts and queue notifications of devices in KVM: GSI routes, irqfds and ioeventfds.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use bascule_devices::interrupt::{Gsi, MsiMessage, MsiRouter};
use bascule_devices::ioeventfd::IoeventfdRegistry;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vm_memory::GuestAddress;
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

/// Pins of the I/O APIC; GSIs below are lines, those from here on are messages.
const IOAPIC_PINS: u32 = 24;
/// Lines that the pair of 8259s has too.
const PIC_LINES: u32 = 16;
/// Lines of one 8259.
const PIC_CHIP_LINES: u32 = 8;
/// KVM's limit on x86 (`KVM_MAX_IRQ_ROUTES`), the lines being counted twice.
const MSI_GSI_MAX: u32 = 4096 - PIC_LINES;

/// The guest's interrupt routing table: fixed lines, and a route per message-signalled vector.
#[derive(Debug)]
pub(crate) struct InterruptRouter {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
}

#[derive(Debug)]
struct Routes {
    gsi_next: u32,
    messages: BTreeMap<u32, MsiMessage>,
}

impl InterruptRouter {
    /// A router with the fixed lines set.
    pub(crate) fn new(vm: Arc<VmFd>) -> io::Result<Self> {
        let routes = Routes {
            gsi_next: IOAPIC_PINS,
            messages: BTreeMap::new(),
        };
        apply(&vm, &routes)?;
        Ok(Self {
            vm,
            routes: Mutex::new(routes),
        })
    }

    /// Makes every write to `irqfd` pulse line `gsi`.
    pub(crate) fn attach_line(&self, gsi: u32, irqfd: &EventFd) -> io::Result<()> {
        self.vm.register_irqfd(irqfd, gsi).map_err(to_io)
    }
}

impl MsiRouter for InterruptRouter {
    fn allocate_gsi(&self) -> io::Result<Gsi> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let gsi = routes.gsi_next;
        if gsi >= MSI_GSI_MAX {
            return Err(io::ErrorKind::StorageFull.into());
        }
        routes.gsi_next += 1;
        Ok(Gsi(gsi))
    }

    fn set_route(&self, gsi: Gsi, message: MsiMessage) -> io::Result<()> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if routes.messages.insert(gsi.0, message) == Some(message) {
            return Ok(());
        }
        apply(&self.vm, &routes)
    }

    fn attach_irqfd(&self, gsi: Gsi, irqfd: &EventFd) -> io::Result<()> {
        self.vm.register_irqfd(irqfd, gsi.0).map_err(to_io)
    }
}

/// The guest's ioeventfds: writes that KVM turns into an eventfd signal without an exit.
#[derive(Debug)]
pub(crate) struct KvmIoeventfds {
    vm: Arc<VmFd>,
}

impl KvmIoeventfds {
    /// The ioeventfds of `vm`.
    pub(crate) const fn new(vm: Arc<VmFd>) -> Self {
        Self { vm }
    }
}

impl IoeventfdRegistry for KvmIoeventfds {
    fn register(&self, ioeventfd: &EventFd, address: GuestAddress) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address.0);
        self.vm
            .register_ioevent(ioeventfd, &address, NoDatamatch)
            .map_err(to_io)
    }

    fn unregister(&self, ioeventfd: &EventFd, address: GuestAddress) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address.0);
        self.vm
            .unregister_ioevent(ioeventfd, &address, NoDatamatch)
            .map_err(to_io)
    }
}

/// Passes the whole table to KVM, which cannot change single entries.
fn apply(vm: &VmFd, routes: &Routes) -> io::Result<()> {
    let mut entries = Vec::with_capacity(40 + routes.messages.len());
    for line in 0..PIC_LINES {
        let (chip, pin) = if line < PIC_CHIP_LINES {
            (KVM_IRQCHIP_PIC_MASTER, line)
        } else {
            (KVM_IRQCHIP_PIC_SLAVE, line - PIC_CHIP_LINES)
        };
        entries.push(line_entry(line, chip, pin));
    }
    for line in 0..IOAPIC_PINS {
        entries.push(line_entry(line, KVM_IRQCHIP_IOAPIC, line));
    }
    for (gsi, message) in &routes.messages {
        entries.push(message_entry(*gsi, *message));
    }
    let table = KvmIrqRouting::from_entries(&entries)
        .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    vm.set_gsi_routing(&table).map_err(to_io)
}

fn line_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn message_entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let [low, high] = [message.address & 0xFFFF_FFFF, message.address >> 32]
        .map(|half| u32::try_from(half).unwrap_or(0));
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: low,
        address_hi: high,
        data: message.data,
        ..Default::default()
    };
    entry
}

fn to_io(error: errno::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
