//! Building a machine; its life cycle is in `lifecycle`, saving and restoring in `save`, resetting in `reset`.
//!
//! # States
//! ```text
//!              boot, incoming            run
//!  VmBuilder ─────────────────► PausedVm ────► RunningVm
//!                                 │  ▲           │
//!           save, restore, reset ─┘  └───────────┘ pause
//!                                 │
//!                                 └─ dropped: threads joined, devices drained, KVM's VM closed
//! ```
//! The types say what is possible when: only a [`PausedVm`] can be saved, and only it can be ended. A
//! guest that ends by itself stays a [`RunningVm`] with parked vCPUs until the VM actor, notified
//! through [`VmBuilder`]'s `on_end`, pauses it. One thread calls all methods; [`MachineHandle`] has
//! what other threads may do at any time.

mod handle;
mod lifecycle;
mod parts;
mod reset;
mod save;
mod start;

use std::sync::Arc;

use bascule_devices::failure::{DeviceFailure, FailureSink};
use bascule_devices::interrupt::MsiRouter;
use bascule_devices::pci::{AddError, PciFunction, PciRoot};
use bascule_devices::virtio::DeviceContext;
use bascule_ipc::vm::Panic;
use bascule_types::{Bytes, VmUid};
use kvm_ioctls::Kvm;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot::{BootError, Entry, OpenImages};
use crate::bus::Bus;
use crate::clock::{HostClock, SystemClock};
use crate::console::Console;
use crate::cpuid::CpuModel;
use crate::dirty::KvmDirtyTracker;
use crate::irq::{InterruptRouter, KvmIoeventfds};
use crate::kvm::{BareVm, KvmError};
use crate::memory::{GuestMemory, MemoryError};
use crate::pm_timer::PmTimer;
use crate::power::Power;
use crate::pvpanic::{OnPanicked, Pvpanic};
use crate::rtc::{RamSizes, Rtc};
use crate::serial::SerialPort;
use crate::vcpu::shape::StateShape;
use crate::vcpu::{OnEnd, Vcpu, msr};
use crate::{GuestEnd, layout, memory};

use self::handle::Machine;
use self::start::{Identity, Start};

pub use handle::MachineHandle;
pub use lifecycle::{PausedVm, RunningVm};
pub use save::RestoreError;

/// A machine being put together.
pub struct VmBuilder {
    bare: BareVm,
    memory: Arc<GuestMemory>,
    identity: Identity,
    router: Arc<InterruptRouter>,
    pci: PciRoot,
    console: Console,
    clock: Arc<dyn HostClock>,
    on_end: OnEnd,
    on_disk_failure: OnDiskFailure,
    on_panicked: OnPanicked,
}

/// Called when a disk has failed, on the disk's thread.
type OnDiskFailure = Arc<dyn Fn(DeviceFailure) + Send + Sync>;

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Guest memory cannot be created.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The kernel cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device does not fit.
    #[error(transparent)]
    Device(#[from] AddError),
    /// An eventfd or an interrupt route cannot be set up.
    #[error("cannot {action}")]
    Interrupt {
        /// The step that failed.
        action: &'static str,
        /// The error of the system call.
        #[source]
        source: std::io::Error,
    },
    /// The ACPI and SMBIOS tables do not fit.
    #[error("cannot write the firmware tables")]
    Tables(#[source] vm_memory::GuestMemoryError),
}

impl VmBuilder {
    /// A machine of `kvm` with `cpus` vCPUs and `memory` of RAM. `on_end` is called on a vCPU's or a device's
    /// thread when the guest ends by itself. It may be called more than once, and must not block.
    ///
    /// # Errors
    /// When the numbers are not possible or KVM refuses; the text names the field.
    pub fn new(
        kvm: Kvm,
        cpus: u32,
        memory: Bytes,
        console: Console,
        on_end: impl Fn(GuestEnd) + Send + Sync + 'static,
    ) -> Result<Self, BuildError> {
        let memory = memory::create(memory)?;
        let bare = BareVm::create(kvm, &memory, cpus)?;
        let router = InterruptRouter::new(Arc::clone(&bare.vm))
            .map_err(interrupt_error("set up interrupt routes"))?;
        let window = GuestAddress(layout::PCI_MMIO_START)..GuestAddress(layout::PCI_MMIO_END);
        Ok(Self {
            bare,
            memory,
            identity: Identity {
                cpus,
                uid: VmUid::from_bytes([0; 16]),
            },
            router: Arc::new(router),
            pci: PciRoot::new(window),
            console,
            clock: Arc::new(SystemClock),
            on_end: Arc::new(on_end),
            on_disk_failure: Arc::new(drop),
            on_panicked: Arc::new(drop),
        })
    }

    /// Tells the guest this UUID, by SMBIOS. Without it, it is told that there is none.
    #[must_use]
    pub const fn with_uid(mut self, uid: VmUid) -> Self {
        self.identity.uid = uid;
        self
    }

    /// Gives the guest's timers another clock than the host's.
    #[cfg(test)]
    pub(crate) fn with_clock(mut self, clock: Arc<dyn HostClock>) -> Self {
        self.clock = clock;
        self
    }

    /// Calls `on_disk_failure` for each disk that fails; the guest runs on and sees I/O errors. Called on
    /// the disk's thread, it must not block. Must be set before any device is added.
    #[must_use]
    pub fn with_disk_failures(
        mut self,
        on_disk_failure: impl Fn(DeviceFailure) + Send + Sync + 'static,
    ) -> Self {
        self.on_disk_failure = Arc::new(on_disk_failure);
        self
    }

    /// Calls `on_panicked` for each panic of the guest's kernel; the guest runs on. Called on the thread of a vCPU,
    /// it must not block.
    #[must_use]
    pub fn with_panics(mut self, on_panicked: impl Fn(Panic) + Send + Sync + 'static) -> Self {
        self.on_panicked = Arc::new(on_panicked);
        self
    }

    /// The RAM, interrupts and ioeventfds for the devices of this machine.
    #[must_use]
    pub fn device_context(&self) -> DeviceContext {
        DeviceContext {
            ram: Arc::clone(&self.memory),
            msi: Arc::clone(&self.router) as Arc<dyn MsiRouter>,
            ioeventfds: Arc::new(KvmIoeventfds::new(Arc::clone(&self.bare.vm))),
            failures: Arc::new(Failures {
                on_end: Arc::clone(&self.on_end),
                on_disk_failure: Arc::clone(&self.on_disk_failure),
            }),
        }
    }

    /// Plugs a device in. Both sides of a migration add the same devices in the same order.
    ///
    /// # Errors
    /// When the bus is full.
    pub fn add_device(&mut self, function: Box<dyn PciFunction>) -> Result<(), BuildError> {
        self.pci.add(function)?;
        Ok(())
    }

    /// The machine with its images loaded, about to execute its first instruction.
    ///
    /// # Errors
    /// When the images cannot be read or do not fit, or KVM refuses.
    pub fn boot(self, images: OpenImages) -> Result<PausedVm, BuildError> {
        let source = images().map_err(BootError::Images)?;
        let entry = start::load(&self.memory, self.identity, source)?;
        self.finish(Some(entry), images)
    }

    /// The machine with empty RAM, waiting for [`PausedVm::restore`]. It boots `images` when it is reset.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn incoming(self, images: OpenImages) -> Result<PausedVm, BuildError> {
        self.finish(None, images)
    }

    fn finish(self, entry: Option<Entry>, images: OpenImages) -> Result<PausedVm, BuildError> {
        let bus = Arc::new(Bus {
            serial: SerialPort::new(self.line(layout::COM1_GSI)?, self.console.clone()),
            power: Power::new(self.line(layout::GED_GSI)?),
            pm_timer: PmTimer::new(Arc::clone(&self.clock)),
            rtc: Rtc::new(Arc::clone(&self.clock), ram_sizes(&self.memory)),
            pvpanic: Arc::new(Pvpanic::new(Arc::clone(&self.on_panicked))),
            pci: Arc::new(self.pci),
        });
        let vcpus = spawn_vcpus(&self.bare, self.identity.cpus, &bus, &self.on_end)?;
        let dirty = KvmDirtyTracker::new(Arc::clone(&self.bare.vm), Arc::clone(&self.memory));
        let machine = Machine {
            start: Start::of(self.identity, &vcpus, &self.bare, images)?,
            vcpus,
            bus,
            dirty: Arc::new(dirty),
            bare: self.bare,
            memory: self.memory,
            resets: 0,
        };
        if let Some(entry) = entry {
            machine.enter(entry)?;
        }
        Ok(PausedVm::new(machine))
    }

    /// An eventfd that pulses interrupt line `gsi`.
    fn line(&self, gsi: u32) -> Result<EventFd, BuildError> {
        let irq = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
            .map_err(interrupt_error("create an eventfd"))?;
        self.router
            .attach_line(gsi, &irq)
            .map_err(interrupt_error("attach an interrupt line"))?;
        Ok(irq)
    }
}

/// The RAM below the hole, and above it.
fn ram_sizes(memory: &GuestMemory) -> RamSizes {
    let mut regions = memory.iter().map(GuestMemoryRegion::len);
    RamSizes {
        low: regions.next().unwrap_or(0),
        high: regions.sum(),
    }
}

/// The vCPUs, each parked on a thread of its own.
fn spawn_vcpus(
    bare: &BareVm,
    cpus: u32,
    bus: &Arc<Bus>,
    on_end: &OnEnd,
) -> Result<Vec<Vcpu>, BuildError> {
    let model = CpuModel::host(&bare.kvm, cpus)?;
    let mut vcpus = Vec::with_capacity(usize::try_from(cpus).unwrap_or(0));
    let mut shape = None;
    for index in 0..cpus {
        let fd = bare
            .vm
            .create_vcpu(index.into())
            .map_err(KvmError::ioctl("create a vCPU"))?;
        fd.set_cpuid2(&model.of_vcpu(index)?)
            .map_err(KvmError::ioctl("set CPUID"))?;
        msr::set_up(&fd)?;
        let shape = match &shape {
            Some(shape) => Arc::clone(shape),
            None => Arc::clone(shape.insert(Arc::new(StateShape::of(&bare.kvm, &bare.vm, &fd)?))),
        };
        let vcpu = Vcpu::spawn(index, fd, Arc::clone(bus), shape, Arc::clone(on_end))?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

impl std::fmt::Debug for VmBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmBuilder")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// Device failures that leave the guest without a device end it; others are passed on.
struct Failures {
    on_end: OnEnd,
    on_disk_failure: OnDiskFailure,
}

impl std::fmt::Debug for Failures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Failures")
    }
}

impl FailureSink for Failures {
    fn device_failed(&self, failure: DeviceFailure) {
        tracing::error!(%failure, "device failed");
        if !failure.ends_the_machine() {
            (self.on_disk_failure)(failure);
            return;
        }
        let what = failure.to_string();
        (self.on_end)(match failure {
            DeviceFailure::BadVirtqueue { .. } => GuestEnd::fault(what),
            _ => GuestEnd::failed(what),
        });
    }
}

fn interrupt_error(action: &'static str) -> impl Fn(std::io::Error) -> BuildError {
    move |source| BuildError::Interrupt { action, source }
}

#[cfg(test)]
mod tests;
