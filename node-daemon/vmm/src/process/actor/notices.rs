//! What vCPU and device threads report of a guest that ends by itself, and when the actor takes it.
//!
//! A report may come at any moment, also between a request to pause and the parking of the vCPUs. So it is
//! taken in every phase in which the machine may be ended, and never run past:
//!
//! | phase | what becomes of a report |
//! |---|---|
//! | `Running` | the machine is paused and ended |
//! | `Pausing` | taken when the vCPUs have parked: whoever waits for the pause is refused |
//! | `Paused`, `Incoming` | the machine is ended |
//! | `InDoubt` | not entered with a report; one that comes later is taken when the guest is resumed |
//! | others | there is no guest |

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::bail;
use bascule_devices::failure::DeviceFailure;
use bascule_ipc::vm::StopReason;

use super::phase::Phase;
use super::vm_actor::VmActor;

/// What device and vCPU threads leave for the actor, because they must not wait for its inbox.
#[derive(Debug, Default)]
pub(super) struct Notices {
    /// Why the guest ended by itself; the first reason counts.
    pub(super) stop: Option<StopReason>,
    /// Failed disks whose guest runs on.
    pub(super) disk_failures: Vec<DeviceFailure>,
}

/// Locks the notices. They are consistent after every assignment, so that a poisoned lock is used.
pub(super) fn lock(notices: &Arc<Mutex<Notices>>) -> MutexGuard<'_, Notices> {
    notices.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VmActor {
    /// Ends a guest that ended by itself, and reports failed disks.
    pub(super) fn process_notices(&mut self) {
        let failures = std::mem::take(&mut lock(&self.notices).disk_failures);
        for failure in failures {
            self.disk_failed(&failure);
        }
        if let Phase::Running(_) | Phase::Paused(_) | Phase::Incoming(_) = self.phase
            && let Some(reason) = self.take_end()
        {
            drop(self.stop(reason));
        }
    }

    /// Takes the reason for which the guest ended by itself, if it did.
    pub(super) fn take_end(&mut self) -> Option<StopReason> {
        let reason = lock(&self.notices).stop.take()?;
        Some(self.host_shutdown.reason(reason))
    }

    /// Refuses what may be done only with a guest that has not ended by itself.
    pub(super) fn refuse_ended(&self) -> anyhow::Result<()> {
        match &lock(&self.notices).stop {
            Some(reason) => bail!(ended_text(reason)),
            None => Ok(()),
        }
    }
}

/// How a guest ended, for whoever waited for something else.
pub(super) fn ended_text(reason: &StopReason) -> String {
    match reason {
        StopReason::GuestShutdown => "the guest has shut itself down".to_owned(),
        StopReason::GuestReset => "the guest has reset itself".to_owned(),
        StopReason::Requested => "the guest was stopped".to_owned(),
        StopReason::GuestFault { what } | StopReason::Failed { what } => {
            format!("the guest has ended: {what}")
        }
    }
}

#[cfg(test)]
mod tests;
