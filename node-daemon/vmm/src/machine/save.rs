//! Saving the state of a paused machine, and restoring it in another.

use bascule_types::Bytes;
use kvm_bindings::{KVM_CLOCK_HOST_TSC, kvm_clock_data};

use super::{PausedVm, parts};
use crate::blob::Blob;
use crate::kvm::KvmError;
use crate::memory;
use crate::state::{MachineState, VERSION};
use crate::vcpu;

/// Why a machine does not restore a saved state. The machine cannot be used again.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state belongs to a machine of another shape.
    #[error("the saved machine has {theirs} {what}, this one {ours}")]
    Shape {
        /// The property that differs.
        what: &'static str,
        /// Its value in the saved machine.
        theirs: u64,
        /// Its value in this machine.
        ours: u64,
    },
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A device refused.
    #[error(transparent)]
    Device(#[from] bascule_devices::state::RestoreError),
    /// The serial port's state is impossible.
    #[error("the serial port's state holds more input than it can")]
    Serial,
}

impl PausedVm {
    /// Everything about the machine but its RAM.
    ///
    /// # Ordering
    /// The vCPUs are parked and the devices drained already. The clock is read right after the
    /// vCPUs' time stamp counters. A device's last interrupt may still be on its way into a local
    /// APIC; a restored device raises its interrupts again.
    ///
    /// # Errors
    /// When KVM refuses. The machine is unharmed and can run on.
    pub fn save(&self) -> Result<MachineState, KvmError> {
        let machine = &self.machine;
        let vcpus = parts::vcpus(&machine.vcpus)?;
        let vm = &machine.bare.vm;
        let clock = vm.get_clock().map_err(KvmError::ioctl("read the clock"))?;
        let irqchips = parts::irqchips(&machine.bare)?;
        let pit = parts::pit(&machine.bare)?;
        Ok(MachineState {
            version: VERSION,
            memory: memory::size_of(&machine.memory),
            vcpus,
            irqchips,
            pit,
            clock: Blob::of(&clock),
            serial: machine.bus.serial.save(),
            power_events: machine.bus.power.save(),
            devices: machine.bus.pci.save(),
            resets: machine.resets,
            pm_timer_ns: Some(machine.bus.pm_timer.save()),
            rtc: Some(machine.bus.rtc.save()),
            console: Some(machine.bus.serial.console().save()),
            panics: machine.bus.pvpanic.status(),
        })
    }

    /// Restores `state`. The machine must be [`crate::VmBuilder::incoming`], with the same devices,
    /// and its RAM must be the saved machine's already: devices read their queues from it.
    ///
    /// # Errors
    /// When the state does not fit or KVM refuses.
    pub fn restore(&mut self, state: MachineState) -> Result<(), RestoreError> {
        self.check_shape(&state)?;
        let machine = &self.machine;
        let offsets: Vec<_> = state
            .vcpus
            .iter()
            .map(|vcpu| (vcpu.tsc_offset, vcpu.tsc_khz))
            .collect();
        let pending: Vec<_> = machine
            .vcpus
            .iter()
            .zip(state.vcpus)
            .map(|(vcpu, state)| vcpu.restore(state))
            .collect::<Result<_, _>>()?;
        for reply in &pending {
            vcpu::answer(reply)?;
        }
        parts::set_irqchips(&machine.bare, &state.irqchips)?;
        parts::set_pit(&machine.bare, state.pit.as_ref())?;
        self.restore_clocks(&state.clock.get(), &offsets)?;
        if !machine.bus.serial.restore(&state.serial) {
            return Err(RestoreError::Serial);
        }
        if let Some(console) = &state.console {
            machine.bus.serial.console().restore(console);
        }
        machine.bus.power.restore(state.power_events);
        if let Some(age_ns) = state.pm_timer_ns {
            machine.bus.pm_timer.restore(age_ns);
        }
        if let Some(rtc) = &state.rtc {
            machine.bus.rtc.restore(rtc);
        }
        machine.bus.pvpanic.restore(state.panics);
        machine.bus.pci.restore(&state.devices)?;
        self.machine.resets = state.resets;
        Ok(())
    }

    fn check_shape(&self, state: &MachineState) -> Result<(), RestoreError> {
        let ours = self.machine.vcpus.len();
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        if state.vcpus.len() != ours {
            let (theirs, ours) = (count(state.vcpus.len()), count(ours));
            return Err(RestoreError::Shape {
                what: "vCPUs",
                theirs,
                ours,
            });
        }
        let Bytes(ours) = memory::size_of(&self.machine.memory);
        if state.memory.0 != ours {
            let theirs = state.memory.0;
            return Err(RestoreError::Shape {
                what: "bytes of memory",
                theirs,
                ours,
            });
        }
        Ok(())
    }

    /// The guest's clock goes on where it stopped: its time does not pass between save and restore,
    /// and two hosts' clocks are never compared. Its time stamp counters follow (KVM vcpu device
    /// attributes, 4.1): offset' = offset + (host TSC there − host TSC here) + rate × (clock here −
    /// clock there), which also holds where both are one host.
    fn restore_clocks(
        &self,
        there: &kvm_clock_data,
        offsets: &[(Option<u64>, Option<u32>)],
    ) -> Result<(), KvmError> {
        let vm = &self.machine.bare.vm;
        let set = kvm_clock_data {
            clock: there.clock,
            ..Default::default()
        };
        vm.set_clock(&set)
            .map_err(KvmError::ioctl("set the clock"))?;
        let here = vm.get_clock().map_err(KvmError::ioctl("read the clock"))?;
        if there.flags & here.flags & KVM_CLOCK_HOST_TSC == 0 {
            // The time stamp counters were set with the MSRs already, to within microseconds.
            return Ok(());
        }
        for (vcpu, (offset, khz)) in self.machine.vcpus.iter().zip(offsets) {
            let (Some(offset), Some(khz)) = (offset, khz) else {
                continue;
            };
            let passed = ticks(here.clock.saturating_sub(there.clock), *khz);
            let moved = offset
                .wrapping_add(there.host_tsc)
                .wrapping_sub(here.host_tsc)
                .wrapping_add(passed);
            vcpu.set_tsc_offset(moved)?;
        }
        Ok(())
    }
}

/// `nanoseconds` in ticks of a counter of `khz`.
fn ticks(nanoseconds: u64, khz: u32) -> u64 {
    let ticks = u128::from(nanoseconds) * u128::from(khz) / 1_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}
