//! The life cycle of a machine, in types.
//!
//! # States
//! ```text
//!  VmBuilder ─boot, incoming─► PausedVm ─────run─────► RunningVm
//!                               │  ▲ │                    │
//!          save, restore, reset └──┘ │ ◄──────pause───────┘
//!                                    │
//!                                    └─end─► threads joined, devices drained, KVM's VM closed
//! ```
//! `run` and `pause` consume the machine; when they fail, it is dropped and cannot be used again.

use bascule_types::WriterState;

use super::handle::{Machine, MachineHandle};
use crate::kvm::KvmError;

/// A machine whose vCPUs are parked and whose devices are drained.
#[derive(Debug)]
pub struct PausedVm {
    pub(super) machine: Machine,
    writer_state: WriterState,
}

/// A machine whose guest runs, or has just ended by itself.
#[derive(Debug)]
pub struct RunningVm {
    machine: Machine,
}

impl PausedVm {
    /// A machine just built: its vCPUs never ran, its devices are still to be paused.
    pub(super) fn new(machine: Machine) -> Self {
        let writer_state = machine.bus.pci.pause();
        Self {
            machine,
            writer_state,
        }
    }

    /// Runs the guest: devices first, so that no request of the guest is lost.
    ///
    /// # Errors
    /// When a vCPU's thread is gone; the machine cannot be used again.
    pub fn run(self) -> Result<RunningVm, KvmError> {
        self.machine.bus.pci.resume();
        for vcpu in &self.machine.vcpus {
            vcpu.run()?;
        }
        Ok(RunningVm {
            machine: self.machine,
        })
    }

    /// Whether every disk write of the virtual machine has succeeded. While it is unclean, a write
    /// may land at any later time, so neither Close nor Transfer may report the writes as complete.
    pub fn writer_state(&self) -> WriterState {
        self.writer_state
    }

    /// A handle for other threads.
    #[must_use]
    pub fn handle(&self) -> MachineHandle {
        self.machine.handle()
    }

    /// How often the guest's machine was reset since its start, also on other nodes.
    #[must_use]
    pub fn resets(&self) -> u32 {
        self.machine.resets
    }

    /// Ends the machine: joins all its threads and closes it. The guest's RAM lives on while a
    /// [`MachineHandle`] exists.
    pub fn end(self) {
        drop(self);
    }
}

impl RunningVm {
    /// Parks all vCPUs, then drains all devices.
    ///
    /// # Guarantees
    /// When it returns, neither vCPUs nor devices write guest memory any more, and every written page is
    /// in the dirty log.
    ///
    /// # Errors
    /// When a vCPU's thread is gone; the machine cannot be used again.
    pub fn pause(self) -> Result<PausedVm, KvmError> {
        for vcpu in &self.machine.vcpus {
            vcpu.kick();
        }
        for vcpu in &self.machine.vcpus {
            vcpu.await_parked()?;
        }
        let writer_state = self.machine.bus.pci.pause();
        if writer_state == WriterState::Unclean {
            tracing::warn!("a disk write failed and may still land after this pause");
        }
        Ok(PausedVm {
            machine: self.machine,
            writer_state,
        })
    }

    /// A handle for other threads.
    #[must_use]
    pub fn handle(&self) -> MachineHandle {
        self.machine.handle()
    }
}
