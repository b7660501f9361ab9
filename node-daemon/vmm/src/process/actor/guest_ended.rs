//! A guest that ends by itself: what its vCPU and device threads report, and when the actor takes it.
//!
//! A report may come at any moment, also between a request to pause and the parking of the vCPUs. So it is
//! taken in every phase in which the machine may be ended, and never run past:
//!
//! | phase | what becomes of a report |
//! |---|---|
//! | `Running` | the machine is paused, and ended or reset |
//! | `Pausing` | taken when the vCPUs have parked: whoever waits for the pause is refused |
//! | `Paused` | the machine is ended, or reset when it is resumed |
//! | `Incoming`, `ResetDelayed` | the machine is ended |
//! | `Resetting` | taken when the reset is done: the machine is ended |
//! | `InDoubt` | not entered with a report; one that comes later is taken when the guest is resumed |
//! | others | there is no guest |

use anyhow::bail;
use bascule_ipc::vm::{ResetCause, StopReason};

use super::host_shutdown_progress::Progress;
use super::notices::{ended_text, lock};
use super::phase::Phase;
use super::vm_actor::VmActor;

impl VmActor {
    /// Ends or resets a guest that ended by itself, and reports failed disks.
    pub(super) fn process_notices(&mut self) {
        let (failures, runs_on) = {
            let mut notices = lock(&self.notices);
            let runs_on = notices.stop.is_none() && notices.reset.is_none();
            (std::mem::take(&mut notices.disk_failures), runs_on)
        };
        for failure in failures {
            self.disk_failed(&failure);
        }
        match self.take_phase() {
            // Why is looked at when it is parked.
            Phase::Running(vm) if !runs_on => self.park(vm),
            phase => self.phase = phase,
        }
        if let Phase::Paused(_) | Phase::Incoming(_) | Phase::ResetDelayed(_) = self.phase
            && let Some(reason) = self.take_end()
        {
            drop(self.stop(reason));
        }
    }

    /// Takes the reason for which the guest ended by itself, if it did. While the host shuts down, a reset
    /// is an end too.
    pub(super) fn take_end(&mut self) -> Option<StopReason> {
        let mut notices = lock(&self.notices);
        if let Some(reason) = notices.stop.take() {
            notices.reset = None;
            return Some(self.host_shutdown.reason(reason));
        }
        if self.host_shutdown == Progress::None {
            return None;
        }
        let end = match notices.reset.take()? {
            ResetCause::Guest | ResetCause::Requested => StopReason::GuestReset,
            cause @ (ResetCause::TripleFault | ResetCause::Panic) => StopReason::GuestFault {
                what: cause.text().to_owned(),
            },
        };
        Some(self.host_shutdown.reason(end))
    }

    /// Takes the cause for which the machine is to be reset, if it is.
    pub(super) fn take_reset(&self) -> Option<ResetCause> {
        lock(&self.notices).reset.take()
    }

    /// Refuses what may be done only with a guest that has not ended by itself.
    pub(super) fn refuse_ended(&self) -> anyhow::Result<()> {
        match &lock(&self.notices).stop {
            Some(reason) => bail!(ended_text(reason)),
            None => Ok(()),
        }
    }

    /// Refuses what may be done only with a guest that goes on where it is.
    pub(super) fn refuse_reset(&self) -> anyhow::Result<()> {
        self.refuse_ended()?;
        match lock(&self.notices).reset {
            Some(cause) => bail!(cause.text()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
