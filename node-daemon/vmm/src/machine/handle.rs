//! The parts of a machine, and the handle to it for other threads.

use std::sync::Arc;

use crate::bus::Bus;
use crate::dirty::KvmDirtyTracker;
use crate::kvm::BareVm;
use crate::memory::GuestMemory;
use crate::pvpanic::Pvpanic;
use crate::vcpu::Vcpu;

use super::start::Start;

/// The parts of a machine, paused or running.
pub(crate) struct Machine {
    /// First, so that the vCPU threads end before the other parts are dropped.
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) bus: Arc<Bus>,
    pub(crate) dirty: Arc<KvmDirtyTracker>,
    pub(crate) bare: BareVm,
    pub(crate) memory: Arc<GuestMemory>,
    /// What a reset returns to and loads.
    pub(super) start: Start,
    /// How often the guest's machine was reset, also before it came here.
    pub(super) resets: u32,
}

/// Access to a machine from any thread, paused or running.
#[derive(Clone, Debug)]
pub struct MachineHandle {
    bus: Arc<Bus>,
    memory: Arc<GuestMemory>,
    dirty: Arc<KvmDirtyTracker>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("vcpus", &self.vcpus.len())
            .finish_non_exhaustive()
    }
}

impl Machine {
    pub(super) fn handle(&self) -> MachineHandle {
        MachineHandle {
            bus: Arc::clone(&self.bus),
            memory: Arc::clone(&self.memory),
            dirty: Arc::clone(&self.dirty),
        }
    }
}

impl MachineHandle {
    /// The guest's RAM.
    #[must_use]
    pub const fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The tracker of pages that the guest or a device has dirtied since the last collection.
    #[must_use]
    pub const fn dirty(&self) -> &Arc<KvmDirtyTracker> {
        &self.dirty
    }

    /// Presses the ACPI power button. The guest may ignore it.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn press_power_button(&self) -> std::io::Result<()> {
        self.bus.power.press_button()
    }

    /// The device that the guest's kernel tells of its panics. Does not keep the RAM.
    pub(crate) fn pvpanic(&self) -> Arc<Pvpanic> {
        Arc::clone(&self.bus.pvpanic)
    }

    /// Passes `input` to the serial console.
    pub fn type_in(&self, input: &[u8]) {
        self.bus.serial.type_in(input);
    }
}
