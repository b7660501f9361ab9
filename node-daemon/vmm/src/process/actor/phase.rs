//! The phases of a VM process, and what exists in each.

use std::sync::Arc;

use bascule_devices::disk::VolumeGate;
use bascule_ipc::vm::{StopReason, VmState};

use crate::process::devices::Devices;
use crate::{MachineHandle, PausedVm, RunningVm};

/// The phase of the machine, with what exists of it then. The diagram is in [`super`].
#[derive(Debug)]
pub(crate) enum Phase {
    /// The machine is being built.
    Starting,
    /// Built; waits for an incoming migration.
    Incoming(PausedVm),
    /// The guest runs, or has just ended by itself.
    Running(RunningVm),
    /// vCPUs are being parked and devices drained.
    Pausing(MachineHandle),
    /// vCPUs are parked and devices drained.
    Paused(PausedVm),
    /// The machine is being returned to its state at power-on.
    Resetting(MachineHandle),
    /// vCPUs are parked: the guest has reset itself too often, and waits before the next reset.
    ResetDelayed(PausedVm),
    /// Paused; the commit request is about to be sent or was sent, and its outcome is not known.
    InDoubt(PausedVm),
    /// The machine is being torn down and its ownership released. The status shows the state from
    /// before until that is done.
    Ending(VmState),
    /// The guest runs on another node.
    Departed,
    /// The guest is off and the machine gone.
    Stopped(StopReason),
}

/// A machine that the build task completed.
#[derive(Debug)]
pub(crate) struct BuiltMachine {
    pub(super) vm: PausedVm,
    /// Passed by every write to the home volume; none without a home volume.
    pub(super) gate: Option<Arc<VolumeGate>>,
    pub(super) devices: Devices,
}

impl Phase {
    /// The phase's name in refusals: "the guest is ...".
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Incoming(_) => "waiting for its migration",
            Self::Running(_) => "running",
            Self::Pausing(_) => "being paused",
            Self::Paused(_) => "paused",
            Self::Resetting(_) => "being reset",
            Self::ResetDelayed(_) => "between two resets",
            Self::InDoubt(_) => "paused until the volume answers the commit request",
            Self::Ending(_) => "being stopped",
            Self::Departed => "on another node",
            Self::Stopped(_) => "stopped",
        }
    }

    /// The machine's handle, while there is a machine.
    pub(super) fn machine(&self) -> Option<MachineHandle> {
        match self {
            Self::Running(vm) => Some(vm.handle()),
            Self::Pausing(machine) | Self::Resetting(machine) => Some(machine.clone()),
            Self::Paused(vm) | Self::Incoming(vm) | Self::ResetDelayed(vm) | Self::InDoubt(vm) => {
                Some(vm.handle())
            }
            Self::Starting | Self::Ending(_) | Self::Departed | Self::Stopped(_) => None,
        }
    }

    /// The state shown in the status. `Pausing` and `Ending` show the state before them; a machine that is
    /// being reset counts as running.
    pub(super) fn state(&self) -> VmState {
        match self {
            Self::Starting => VmState::Starting,
            Self::Incoming(_) => VmState::Incoming,
            Self::Running(_) | Self::Pausing(_) | Self::Resetting(_) | Self::ResetDelayed(_) => {
                VmState::Running
            }
            Self::Paused(_) => VmState::Paused,
            Self::Ending(shown) => shown.clone(),
            Self::InDoubt(_) => VmState::InDoubt,
            Self::Departed => VmState::Departed,
            Self::Stopped(reason) => VmState::Stopped(reason.clone()),
        }
    }
}
