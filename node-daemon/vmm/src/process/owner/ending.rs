//! Standing still and ending.
//!
//! Both wait for others: processors park, devices wait for the disk commands that are under way,
//! the volume releases the row. A device that hangs makes that take as long as it hangs: a write
//! that may still land must not be forgotten. So a thread of its own waits, and the owner answers
//! meanwhile, and says what for.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bascule_ipc::vm::{StopReason, VmState};
use bascule_ipc::volume::Response as VolumeResponse;
use bascule_types::{Change, Epoch, Owner as Tenant, VmUid};

use super::{Owner, OwnerHandle, Phase};
use crate::kvm::KvmError;
use crate::process::volume::VolumeClient;
use crate::{PausedVm, RunningVm};

/// How often a release is asked for before the guest counts as stopped, and then ever again.
const RELEASE_ATTEMPTS: u32 = 2;
/// Pause between two attempts after that.
const RELEASE_PAUSE: Duration = Duration::from_secs(1);

/// Comes when something that was begun is done, with why it failed if it did.
pub(crate) type Done = Receiver<Result<(), String>>;

/// Those who wait for something to be done.
#[derive(Debug, Default)]
pub(super) struct Waiters(Vec<SyncSender<Result<(), String>>>);

impl Waiters {
    fn join(&mut self) -> Done {
        let (done_tx, done_rx) = sync_channel(1);
        self.0.push(done_tx);
        done_rx
    }

    pub(super) fn tell(&mut self, outcome: &Result<(), String>) {
        for waiter in self.0.drain(..) {
            if waiter.send(outcome.clone()).is_err() {
                tracing::debug!("nobody awaits the outcome any more");
            }
        }
    }
}

impl Owner {
    /// Begins to pause a running guest.
    pub(crate) fn pause(&mut self) -> anyhow::Result<Done> {
        match self.take_phase() {
            Phase::Running(vm) => {
                let done = self.pausing.join();
                self.park(vm);
                Ok(done)
            }
            phase => {
                self.phase = phase;
                bail!(self.refusal());
            }
        }
    }

    fn park(&mut self, vm: RunningVm) {
        self.phase = Phase::Pausing(vm.handle());
        self.aside("pause", move |owner| {
            let paused = vm.pause();
            owner.tell(move |owner| owner.parked(paused));
        });
    }

    fn parked(&mut self, paused: Result<PausedVm, KvmError>) {
        match (paused, self.stop_wanted.take()) {
            (Ok(vm), None) => {
                self.phase = Phase::Paused(vm);
                self.pausing.tell(&Ok(()));
            }
            (Ok(vm), Some(reason)) => {
                self.pausing.tell(&Err("the guest was stopped".to_owned()));
                self.end(Some(vm), VmState::Running, reason);
            }
            (Err(error), _) => {
                let what = format!("pause: {error}");
                tracing::error!(what, "the machine is lost");
                self.pausing.tell(&Err(what.clone()));
                self.end(None, VmState::Running, StopReason::Failed { what });
            }
        }
    }

    /// Begins to end the machine: to drain its devices and to give the row up. The process stays to
    /// tell why.
    pub(crate) fn stop(&mut self, reason: StopReason) -> Done {
        let done = self.stopping.join();
        let shown = self.state();
        match self.take_phase() {
            Phase::Running(vm) => {
                self.stop_wanted = Some(reason);
                self.park(vm);
            }
            Phase::Paused(vm) | Phase::Incoming(vm) => self.end(Some(vm), shown, reason),
            phase @ (Phase::Starting | Phase::Pausing(_)) => {
                self.phase = phase;
                self.stop_wanted.get_or_insert(reason);
            }
            phase @ Phase::Ending(_) => self.phase = phase,
            // Nobody but the volume decides about a guest in doubt, and a departed or stopped one
            // has nothing left to end.
            phase @ (Phase::InDoubt(_) | Phase::Departed | Phase::Stopped(_)) => {
                self.phase = phase;
                self.stopping.tell(&Ok(()));
            }
        }
        done
    }

    /// Takes apart what there is of the machine, tells the volume that this tenure's writes are over,
    /// and gives the row up.
    pub(super) fn end(&mut self, machine: Option<PausedVm>, shown: VmState, reason: StopReason) {
        self.phase = Phase::Ending(shown);
        let (uid, volume, tenure) = (self.config.uid, self.volume.clone(), self.end_tenure());
        self.aside("end", move |owner| {
            if let Some(machine) = machine {
                machine.end();
            }
            let row = volume.zip(tenure);
            let release = || match &row {
                Some((volume, (tenant, epoch))) => try_release(volume, uid, *tenant, *epoch),
                None => true,
            };
            let released = (0..RELEASE_ATTEMPTS).any(|_| release());
            owner.tell(move |owner| owner.stopped(reason));
            if !released {
                tracing::warn!("the volume does not answer: releasing the row in the background");
                while !release() {
                    std::thread::sleep(RELEASE_PAUSE);
                }
            }
        });
    }

    /// Does something that may take long on a thread of its own, which tells the owner in the end.
    pub(super) fn aside(&mut self, name: &str, work: impl FnOnce(&OwnerHandle) + Send + 'static) {
        let owner = self.handle();
        let spawned = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work(&owner));
        if let Err(error) = spawned {
            tracing::error!(%error, name, "the row stays owned: no thread to end it in order");
            let what = format!("{name}: no thread: {error}");
            self.pausing.tell(&Err(what.clone()));
            self.stopped(StopReason::Failed { what });
        }
    }
}

/// One attempt; `true` when it is settled, one way or the other.
fn try_release(volume: &Arc<VolumeClient>, vm: VmUid, from: Tenant, epoch: Epoch) -> bool {
    let released = volume.close(from, epoch).and_then(|()| {
        volume
            .change(Change::Release { vm, from, epoch })
            .context("release the row")
    });
    match released {
        Ok(VolumeResponse::Granted(_)) => true,
        Ok(VolumeResponse::Refused(refusal)) => {
            tracing::warn!(%refusal, "release");
            true
        }
        Ok(other) => {
            tracing::info!(?other, "release not answered yet");
            false
        }
        Err(error) => {
            tracing::info!(
                error = format_args!("{error:#}"),
                "release not answered yet"
            );
            false
        }
    }
}
