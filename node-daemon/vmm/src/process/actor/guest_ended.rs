//! A guest that ends by itself: what its vCPU and device threads report, and when the actor takes it.
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

use anyhow::bail;
use bascule_ipc::vm::StopReason;

use super::notices::{ended_text, lock};
use super::phase::Phase;
use super::vm_actor::VmActor;

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

#[cfg(test)]
mod tests;
