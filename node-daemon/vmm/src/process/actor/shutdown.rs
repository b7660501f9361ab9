//! Pausing and ending a machine.
//!
//! Both wait: vCPUs park, devices complete the disk commands under way, the volume releases the
//! ownership. With a device that hangs the wait has no bound, because a write that may still land
//! must not be forgotten. So a task thread waits, while the actor serves requests and reports what
//! the machine waits for.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bascule_ipc::vm::{StopReason, VmState};
use bascule_ipc::volume::Response as VolumeResponse;
use bascule_types::{Change, Ownership, VmUid};

use super::event::{ActorHandle, Done, TaskOutcome};
use super::notices::ended_text;
use super::phase::Phase;
use super::vm_actor::{PauseFor, VmActor};
use crate::kvm::KvmError;
use crate::process::home_volume::VolumeClient;
use crate::{PausedVm, RunningVm};

/// Attempts to release the ownership before the guest counts as stopped. Later attempts go on in
/// the background until the volume answers.
const RELEASE_ATTEMPTS: u32 = 2;
/// First and longest pause between two attempts in the background. A writer with a failed write is refused
/// until its node was restarted.
const RELEASE_PAUSE_MIN: Duration = Duration::from_secs(1);
const RELEASE_PAUSE_MAX: Duration = Duration::from_secs(60);

impl VmActor {
    /// Begins to pause a running guest.
    pub(super) fn pause(&mut self, pause_for: PauseFor) -> anyhow::Result<Done> {
        match self.take_phase() {
            Phase::Running(vm) => {
                let done = self.pausing.join();
                self.pause_for = Some(pause_for);
                self.park(vm);
                Ok(done)
            }
            phase => {
                self.phase = phase;
                bail!(self.refusal());
            }
        }
    }

    pub(super) fn park(&mut self, vm: RunningVm) {
        self.phase = Phase::Pausing(vm.handle());
        self.spawn_task("pause", move |actor| {
            actor.task_ended(TaskOutcome::Parked(vm.pause()));
        });
    }

    /// The vCPUs have parked: a stop that was requested meanwhile comes first, then what the guest did in
    /// its last moments, and only then the pause. One that was requested by a user lasts: the machine is
    /// reset when it is resumed.
    pub(super) fn parked(&mut self, paused: Result<PausedVm, KvmError>) {
        let (wanted, pause_for) = (self.stop_wanted.take(), self.pause_for.take());
        let vm = match paused {
            Ok(vm) => vm,
            Err(error) => {
                let what = format!("pause: {error}");
                tracing::error!(what, "the machine is lost");
                self.pausing.finish(&Err(what.clone()));
                self.end(None, VmState::Running, StopReason::Failed { what });
                return;
            }
        };
        if let Some(reason) = wanted.or_else(|| self.take_end()) {
            self.pausing.finish(&Err(ended_text(&reason)));
            self.end(Some(vm), VmState::Running, reason);
        } else if pause_for != Some(PauseFor::Request)
            && let Some(cause) = self.take_reset()
        {
            self.pausing.finish(&Err(cause.text().to_owned()));
            self.reset(vm, cause);
        } else {
            self.phase = Phase::Paused(vm);
            self.pausing.finish(&Ok(()));
        }
    }

    /// Begins to end the machine: pauses it, drains its devices and releases the ownership. The
    /// process runs on to report the reason.
    pub(super) fn stop(&mut self, reason: StopReason) -> Done {
        let done = self.stopping.join();
        let shown = self.phase.state();
        match self.take_phase() {
            Phase::Running(vm) => {
                self.stop_wanted = Some(reason);
                self.park(vm);
            }
            Phase::Paused(vm) | Phase::Incoming(vm) | Phase::ResetDelayed(vm) => {
                self.end(Some(vm), shown, reason);
            }
            phase @ (Phase::Starting | Phase::Pausing(_) | Phase::Resetting(_)) => {
                self.phase = phase;
                self.stop_wanted.get_or_insert(reason);
            }
            phase @ Phase::Ending(_) => self.phase = phase,
            // In doubt, only the volume decides about the guest; departed or stopped, nothing is
            // left to end.
            phase @ (Phase::InDoubt(_) | Phase::Departed | Phase::Stopped(_)) => {
                self.phase = phase;
                self.stopping.finish(&Ok(()));
            }
        }
        done
    }

    /// Tears the machine down if there is one, tells the volume that the writes of this ownership
    /// are complete, and releases it. The status shows `shown` until then.
    pub(super) fn end(&mut self, machine: Option<PausedVm>, shown: VmState, reason: StopReason) {
        self.phase = Phase::Ending(shown);
        self.reset_waits = None;
        let (uid, volume, ended) = (self.config.uid, self.volume.clone(), self.end_ownership());
        self.spawn_task("end", move |actor| {
            if let Some(machine) = machine {
                machine.end();
            }
            let owned = volume.zip(ended);
            let mut retries = ReleaseRetries::default();
            let mut release = || match &owned {
                Some((volume, ownership)) => retries.note(try_release(volume, uid, *ownership)),
                None => None,
            };
            let released = (0..RELEASE_ATTEMPTS).any(|_| release().is_none());
            actor.task_ended(TaskOutcome::Ended(reason));
            if !released {
                tracing::warn!("releasing the ownership in the background");
                while let Some(pause) = release() {
                    std::thread::sleep(pause);
                }
            }
        });
    }

    /// Runs `task` on a thread of its own; it reports its outcome to the actor. When there is no
    /// thread, the guest counts as stopped and its ownership is not released.
    pub(super) fn spawn_task(
        &mut self,
        name: &str,
        task: impl FnOnce(&ActorHandle) + Send + 'static,
    ) {
        let actor = self.handle();
        let spawned = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || task(&actor));
        if let Err(error) = spawned {
            tracing::error!(%error, name, "cannot start a thread: the ownership is not released");
            let what = format!("{name}: no thread: {error}");
            self.pausing.finish(&Err(what.clone()));
            self.stopped(StopReason::Failed { what });
        }
    }
}

/// The attempts to release an ownership: how long to wait for the next, and whether its outcome is news.
#[derive(Debug, Default)]
struct ReleaseRetries {
    pause: Option<Duration>,
    reason: Option<String>,
}

impl ReleaseRetries {
    /// The pause after an attempt: none when the volume granted or refused the release for good, doubled
    /// with each that failed. Logs why one failed, but the same reason once.
    fn note(&mut self, attempt: Result<(), String>) -> Option<Duration> {
        let reason = attempt.err()?;
        if self.is_news(reason) {
            let reason = self.reason.as_deref();
            tracing::info!(reason, "the ownership is not released yet");
        }
        let doubled = self.pause.map(|pause| pause.saturating_mul(2));
        let pause = doubled.map_or(RELEASE_PAUSE_MIN, |pause| pause.min(RELEASE_PAUSE_MAX));
        self.pause = Some(pause);
        self.pause
    }

    fn is_news(&mut self, reason: String) -> bool {
        let is_news = self.reason.as_ref() != Some(&reason);
        self.reason = Some(reason);
        is_news
    }
}

/// Makes one attempt.
///
/// # Errors
/// Why the volume has neither granted nor refused the release.
fn try_release(volume: &Arc<VolumeClient>, vm: VmUid, ownership: Ownership) -> Result<(), String> {
    let release = Change::Release {
        vm,
        from: ownership.owner,
        epoch: ownership.epoch,
    };
    let released = volume
        .close(ownership)
        .and_then(|()| volume.change(release).context("release the ownership"));
    match released {
        Ok(VolumeResponse::Granted(_)) => Ok(()),
        Ok(VolumeResponse::Refused(refusal)) => {
            tracing::warn!(%refusal, "the volume refused to release the ownership");
            Ok(())
        }
        Ok(VolumeResponse::Unavailable { reason }) => Err(reason),
        Ok(other) => Err(format!("the volume answers {other:?}")),
        Err(error) => Err(format!("{error:#}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The process of a VM with a failed write used to try, and to log, once a second.
    #[test]
    fn attempts_to_release_become_rarer_and_a_reason_is_news_once() {
        let mut retries = ReleaseRetries::default();
        let mut failed = || retries.note(Err("a write failed".to_owned()));
        let pauses: Vec<_> = (0..8).filter_map(|_| failed()).collect();
        let seconds: Vec<_> = pauses.iter().map(Duration::as_secs).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert!(!retries.is_news("a write failed".to_owned()));
        assert!(retries.is_news("no coordinator".to_owned()));
        assert_eq!(retries.note(Ok(())), None);
    }
}
