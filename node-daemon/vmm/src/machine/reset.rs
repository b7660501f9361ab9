//! Resetting a machine: what its guest did is gone, and it starts again.
//!
//! A reset is that of a PC's reset line, with firmware that loads the images anew: nothing of the guest
//! survives it in processors, devices or memory. What is not the guest's stays: threads, file descriptors,
//! the machine's ownership, a failed write that may still land (docs/adr/0012).

use super::{BuildError, Machine, PausedVm, parts, start};
use crate::boot::Entry;
use crate::kvm::KvmError;
use crate::{boot, memory, vcpu};

impl Machine {
    /// Lets the boot processor, which is as at power-on, begin at `entry`.
    pub(super) fn enter(&self, entry: Entry) -> Result<(), BuildError> {
        let (Some(vcpu), Some(power_on)) = (self.vcpus.first(), self.start.vcpus.first()) else {
            return Ok(());
        };
        let first = boot::registers(&self.memory, power_on.sregs.get(), entry)?;
        Ok(vcpu.set_first_registers(first)?)
    }

    /// The timer first: one that the guest left running raises its line in the meantime.
    fn reset_controllers(&self) -> Result<(), KvmError> {
        parts::set_pit(&self.bare, self.start.pit.as_ref())?;
        parts::set_irqchips(&self.bare, &self.start.irqchips)
    }

    fn reset_vcpus(&self) -> Result<(), KvmError> {
        let each = self.vcpus.iter().zip(&self.start.vcpus);
        let pending: Vec<_> = each
            .map(|(vcpu, power_on)| vcpu.reset(power_on))
            .collect::<Result<_, _>>()?;
        pending.iter().try_for_each(vcpu::answer)
    }
}

impl PausedVm {
    /// Resets the machine: what the guest executes next is the first instruction of its kernel.
    ///
    /// # Ordering
    /// The vCPUs are parked and no disk command is in flight. The images come first: as long as they cannot
    /// be read, nothing is changed. Devices come before the memory, to which their queues point; then timers, interrupt
    /// controllers, and the local APICs last, so that no interrupt of before is left in one.
    ///
    /// # Guarantees
    /// Requests that the guest has made and the disks have not submitted yet are dropped; every other has
    /// ended. No file is opened but a boot image in a file. [`PausedVm::writer_state`] stays: a write that
    /// failed may land after the reset too.
    ///
    /// # Errors
    /// When the images cannot be read or loaded, or KVM refuses. The machine cannot be used again.
    pub fn reset(&mut self) -> Result<(), BuildError> {
        let machine = &mut self.machine;
        let source = (machine.start.images)().map_err(boot::BootError::Images)?;
        machine.bus.reset();
        memory::clear(&machine.memory)?;
        let entry = start::load(&machine.memory, machine.start.identity, source)?;
        machine.reset_controllers()?;
        machine.reset_vcpus()?;
        machine.enter(entry)?;
        machine.dirty.mark_all();
        machine.resets = machine.resets.saturating_add(1);
        Ok(())
    }
}
