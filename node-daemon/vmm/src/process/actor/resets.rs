//! Resetting the machine in place: a reboot of the guest, a triple fault, or a request.
//!
//! ```text
//!             parked, reset noticed              done
//!  Pausing ──┬───────────────────────► Resetting ─────► Running
//!            │                           ▲
//!            └─ too often ─► ResetDelayed┘ wait over, or requested
//! ```
//! A guest that resets itself again and again costs what its boot images cost to read, and the memory
//! that is cleared: [`Resets`] makes such a guest wait. A reset during the pre-copy of a migration is
//! like any other write to all of its memory; a pause that a migration requests is refused by one, and
//! the guest goes on here.

use std::time::Instant;

use anyhow::bail;
use bascule_ipc::vm::{ResetCause, ResetStatus, StopReason, VmState};

use super::event::TaskOutcome;
use super::host_shutdown_progress::Progress;
use super::notices::lock;
use super::phase::Phase;
use super::vm_actor::VmActor;
use crate::{BuildError, PausedVm};

impl VmActor {
    /// [`bascule_ipc::vm::Request::Reset`]. A guest that is paused is reset when it is resumed.
    pub(super) fn reset_requested(&mut self) -> anyhow::Result<()> {
        match self.take_phase() {
            Phase::ResetDelayed(vm) => self.reset_now(vm),
            phase => {
                self.phase = phase;
                match self.phase {
                    Phase::Paused(_) => self.no_migration()?,
                    Phase::Running(_) => {}
                    _ => bail!(self.refusal()),
                }
                let cause = ResetCause::Requested;
                lock(&self.notices).reset.get_or_insert(cause);
            }
        }
        Ok(())
    }

    /// Resets a machine whose vCPUs are parked, after the wait that its earlier resets cause.
    pub(super) fn reset(&mut self, vm: PausedVm, cause: ResetCause) {
        // What a disk held back is dropped.
        self.disk_error = None;
        let wait = self.resets.due(cause, Instant::now());
        tracing::info!(?cause, ?wait, "{}: the machine is reset", cause.text());
        if wait.is_zero() {
            self.reset_now(vm);
            return;
        }
        let waits = self.resets.waits(wait);
        tracing::warn!(waits, "a reset is delayed");
        self.delayed = self.delayed.wrapping_add(1);
        let number = self.delayed;
        self.reset_waits = Some(waits);
        self.phase = Phase::ResetDelayed(vm);
        self.spawn_task("reset-wait", move |actor| {
            std::thread::sleep(wait);
            actor.task_ended(TaskOutcome::ResetDue(number));
        });
    }

    /// The wait number `number` is over.
    pub(super) fn reset_due(&mut self, number: u64) {
        match self.take_phase() {
            Phase::ResetDelayed(vm) if number == self.delayed => self.reset_now(vm),
            // It was reset on request, or ended.
            phase => self.phase = phase,
        }
    }

    fn reset_now(&mut self, mut vm: PausedVm) {
        self.reset_waits = None;
        self.phase = Phase::Resetting(vm.handle());
        self.spawn_task("reset", move |actor| {
            let reset = vm.reset().map(|()| vm);
            actor.task_ended(TaskOutcome::Reset(reset));
        });
    }

    /// The machine is as after power-on: a stop that was requested meanwhile comes first.
    pub(super) fn reset_done(&mut self, reset: Result<PausedVm, BuildError>) {
        let wanted = self.stop_wanted.take();
        match reset {
            Ok(vm) => match wanted.or_else(|| self.take_end()) {
                Some(reason) => self.end(Some(vm), VmState::Running, reason),
                // It would only be switched off again.
                None if self.host_shutdown != Progress::None => {
                    self.end(Some(vm), VmState::Running, StopReason::Requested);
                }
                None => {
                    self.resets.begin(Instant::now());
                    if let Err(error) = self.run(vm) {
                        self.reset_failed(&format!("run after the reset: {error}"));
                    }
                }
            },
            Err(error) => self.reset_failed(&format!("reset: {:#}", anyhow::Error::from(error))),
        }
    }

    fn reset_failed(&mut self, what: &str) {
        tracing::error!(what, "the machine is lost");
        let what = what.to_owned();
        self.end(None, VmState::Running, StopReason::Failed { what });
    }

    pub(super) fn reset_status(&self) -> ResetStatus {
        ResetStatus {
            count: self.resets.count,
            last: self.resets.last,
            waits: self.reset_waits.clone(),
        }
    }
}

#[cfg(test)]
mod panic_tests;
#[cfg(test)]
mod tests;
