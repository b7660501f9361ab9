//! Migrations of this process's machine. Each attempt runs on a thread of its own; the machine stays
//! with the actor, which applies the steps that the thread requests and the outcome at the end.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bascule_ipc::vm::{MigrationLimits, StartMode, StopReason};
use bascule_types::{AttemptId, Owner, Ownership, SavedStateRow, VmUid, WriterState};

use super::event::{ActorGone, ActorHandle, MigrationRequest};
use super::migration_guest::{ActorArrival, ActorGuest};
use super::phase::Phase;
use super::vm_actor::{PauseFor, VmActor};
use crate::MachineHandle;
use crate::migration::{
    Incoming, IncomingEnd, MigrationControl, Outgoing, OutgoingEnd, PrefaultedMemory, Quick,
    SavedArea, listen_in, migrate_live, migrate_quick, receive_live,
};
use crate::process::home_volume::{NO_HOME, UNCLEAN, VolumeClient, ownership_client};

/// Pauses before the addresses of an arrived guest are announced again: switches may still be
/// learning its old port.
const ANNOUNCE_AGAIN: [Duration; 3] = [
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_millis(800),
];

impl VmActor {
    /// Applies one request of a migration thread.
    pub(super) fn migration_request(&mut self, request: MigrationRequest) {
        match request {
            MigrationRequest::Pause(reply) => {
                reply.send(self.pause(PauseFor::Migration));
            }
            MigrationRequest::Save(reply) => reply.send(self.save()),
            MigrationRequest::ResumeSource(ownership, reply) => {
                reply.send(self.resume_source(ownership));
            }
            MigrationRequest::MarkInDoubt(reply) => reply.send(self.mark_in_doubt()),
            MigrationRequest::OutgoingEnded(end, reply) => {
                self.outgoing_ended(&end);
                reply.send(());
            }
            MigrationRequest::Listening(address, reply) => {
                self.listening = address;
                reply.send(());
            }
            MigrationRequest::Restore(state, reply) => reply.send(match &mut self.phase {
                Phase::Incoming(vm) => vm.restore(*state).map_err(Into::into),
                _ => Err(anyhow::Error::msg(self.refusal())),
            }),
            MigrationRequest::TakeOver(ownership, reply) => {
                if let Some(gate) = &self.gate {
                    gate.set_owner(ownership.owner);
                }
                self.begin_ownership(ownership);
                reply.send(Ok(()));
            }
            MigrationRequest::Announce(reply) => {
                reply.send(self.devices.announce().map_err(Into::into));
            }
            MigrationRequest::RunArrived(reply) => reply.send(match self.phase {
                Phase::Incoming(_) => self.resume(),
                _ => Err(anyhow::Error::msg(self.refusal())),
            }),
            MigrationRequest::IncomingEnded(end, reply) => {
                self.incoming_ended(end);
                reply.send(());
            }
            MigrationRequest::Failed(what, reply) => {
                if let Phase::Incoming(_) = self.phase {
                    drop(self.stop(StopReason::Failed { what }));
                }
                reply.send(());
            }
        }
    }

    /// Begins a live migration to the node `to`, which listens at `peer`. Its progress is in the
    /// status.
    pub(super) fn migrate_live(
        &mut self,
        attempt: AttemptId,
        (peer, to): (SocketAddr, Owner),
        limits: MigrationLimits,
    ) -> anyhow::Result<()> {
        if self.is_in_progress(attempt) {
            return Ok(());
        }
        let machine = self.movable()?;
        let ownership = self.ownership.context(NO_HOME)?;
        let described = (&self.config, self.devices.offered_mtus());
        let job = Outgoing::new(described, ownership, (attempt, peer, to), limits)?;
        let control = Arc::new(MigrationControl::new(attempt));
        let mut guest = ActorGuest(self.handle());
        let (socket, uid) = self.home_socket()?;
        self.spawn_migration("migrate-out", &control, move |control| {
            let mut client = ownership_client(&socket, uid)?;
            let end = migrate_live(&mut guest, machine, &job, &mut client, control);
            guest
                .0
                .migration(|reply| MigrationRequest::OutgoingEnded(end, reply))
                .map_err(ending)
        })
    }

    /// Begins a quick migration to the node `to`, or to the next owner when there is none.
    pub(super) fn migrate_quick(
        &mut self,
        attempt: AttemptId,
        to: Option<Owner>,
    ) -> anyhow::Result<()> {
        if self.is_in_progress(attempt) {
            return Ok(());
        }
        let machine = self.movable()?;
        let ownership = self.ownership.context(NO_HOME)?;
        let gate = self.gate.clone().context(NO_HOME)?;
        let volume = self.volume.clone().context(NO_HOME)?;
        let job = Quick::new(&self.config, ownership, attempt, to)?;
        let (socket, uid) = self.home_socket()?;
        let control = Arc::new(MigrationControl::new(attempt));
        let mut guest = ActorGuest(self.handle());
        self.spawn_migration("migrate-quick", &control, move |control| {
            let mut client = ownership_client(&socket, uid)?;
            let area = |reserved: &SavedStateRow| {
                // Opening an open volume again passes its device once more.
                let opened = volume.open(ownership);
                let opened = opened.map_err(|error| format!("{error:#}"))?;
                Ok(SavedArea {
                    device: opened.device,
                    extents: reserved.extents.clone(),
                    gate: Some(gate),
                })
            };
            let end = migrate_quick(&mut guest, &machine, &job, &mut client, area, control);
            guest
                .0
                .migration(|reply| MigrationRequest::OutgoingEnded(end, reply))
                .map_err(ending)
        })
    }

    /// The running machine, unless a migration is in progress.
    fn movable(&self) -> anyhow::Result<MachineHandle> {
        self.no_migration()?;
        match &self.phase {
            Phase::Running(vm) => Ok(vm.handle()),
            _ => bail!(self.refusal()),
        }
    }

    /// Whether this attempt is in progress already: an operator that took over from another repeats
    /// its requests.
    fn is_in_progress(&self, attempt: AttemptId) -> bool {
        let mut present = self.migration.iter();
        present.any(|control| !control.has_ended() && control.status().attempt == attempt)
    }

    /// Refuses what a migration in progress forbids.
    pub(super) fn no_migration(&self) -> anyhow::Result<()> {
        match &self.migration {
            Some(control) if !control.has_ended() => bail!("a migration is under way"),
            _ => Ok(()),
        }
    }

    /// Cancels a migration.
    pub(super) fn cancel_migration(&self, attempt: AttemptId) -> anyhow::Result<()> {
        let control = self.migration.as_ref().context("there is no migration")?;
        if control.status().attempt != attempt {
            bail!("another attempt is the present one");
        }
        if !control.cancel() {
            bail!("it is too late: the migration is over, or its commit was requested");
        }
        Ok(())
    }

    /// Begins to wait for a migration to the machine that was built.
    pub(super) fn await_arrival(&mut self, machine: MachineHandle) -> anyhow::Result<()> {
        let StartMode::Incoming {
            listen,
            ports,
            attempt,
        } = self.config.start
        else {
            bail!("start: not incoming");
        };
        let job = Incoming::new(&self.config, attempt)?;
        let volume = self.volume.clone().context("the VM has no home volume")?;
        let control = Arc::new(MigrationControl::new(attempt));
        let actor = self.handle();
        let (socket, uid) = self.home_socket()?;
        self.spawn_migration("migrate-in", &control, move |control| {
            let memory = PrefaultedMemory::begin(&machine, job.faults)
                .map_err(|error| format!("start a thread: {error}"))?;
            let listener = listen_in(listen, ports).map_err(|error| error.to_string())?;
            let address = listener.local_addr().ok();
            let mut client = ownership_client(&socket, uid)?;
            actor
                .migration(|reply| MigrationRequest::Listening(address, reply))
                .map_err(ending)?;
            let mut guest = ActorArrival {
                actor: actor.clone(),
                volume,
            };
            let end = receive_live(&listener, &mut guest, &memory, &job, &mut client, control);
            drop((listener, memory));
            let arrived = matches!(end, IncomingEnd::Running { .. });
            actor
                .migration(|reply| MigrationRequest::IncomingEnded(end, reply))
                .map_err(ending)?;
            if arrived {
                announce_again(&actor);
            }
            Ok(())
        })
    }

    /// Runs `run` on a thread of its own; its failure ends the attempt.
    fn spawn_migration(
        &mut self,
        name: &str,
        control: &Arc<MigrationControl>,
        run: impl FnOnce(&MigrationControl) -> Result<(), String> + Send + 'static,
    ) -> anyhow::Result<()> {
        let thread = Arc::clone(control);
        let actor = self.handle();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let Err(what) = run(&thread) else {
                    return;
                };
                tracing::error!(what, "the migration failed");
                thread.fail(what.clone());
                if let Err(error) = actor.migration(|reply| MigrationRequest::Failed(what, reply)) {
                    tracing::debug!(%error, "the failure of a migration is not reported");
                }
            })
            .context("start a thread")?;
        self.migration = Some(Arc::clone(control));
        Ok(())
    }

    /// The socket of the home volume's process.
    fn home_socket(&self) -> anyhow::Result<(PathBuf, VmUid)> {
        let home = self.config.home.as_ref();
        let home = home.context("the VM has no home volume")?;
        Ok((home.socket.clone(), self.config.uid))
    }

    fn save(&self) -> anyhow::Result<Vec<u8>> {
        match &self.phase {
            Phase::Paused(vm) => Ok(vm.save()?.encode()?),
            _ => bail!(self.refusal()),
        }
    }

    /// An attempt has failed: the guest goes on here. The ownership comes first, so that whatever ends the
    /// guest from now on releases the present one.
    pub(super) fn resume_source(&mut self, ownership: Option<Ownership>) -> anyhow::Result<()> {
        if let Some(ownership) = ownership {
            self.begin_ownership(ownership);
            if let Some(gate) = &self.gate {
                gate.set_owner(ownership.owner);
            }
        }
        match self.phase {
            // It goes on by itself, also when it was reset instead of paused.
            Phase::Running(_)
            | Phase::Pausing(_)
            | Phase::Resetting(_)
            | Phase::ResetDelayed(_) => Ok(()),
            _ => self.resume(),
        }
    }

    /// Before the commit request of a live and of a quick migration. An unclean writer ends the attempt
    /// here: a write of it may land after the first one of the destination. So does a guest that has ended
    /// by itself or is to be reset: the destination would run past that.
    pub(super) fn mark_in_doubt(&mut self) -> anyhow::Result<()> {
        self.refuse_reset()?;
        if let Phase::Paused(vm) = &self.phase {
            let gate = self.gate.as_ref();
            let state = gate.map_or(WriterState::Clean, |gate| gate.writer_state());
            if vm.writer_state().and(state) == WriterState::Unclean {
                bail!(UNCLEAN);
            }
        }
        match self.take_phase() {
            Phase::Paused(vm) => {
                self.phase = Phase::InDoubt(vm);
                Ok(())
            }
            phase => {
                self.phase = phase;
                bail!(self.refusal())
            }
        }
    }

    fn outgoing_ended(&mut self, end: &OutgoingEnd) {
        match end {
            // The guest was resumed already, or has ended.
            OutgoingEnd::Kept { .. } => {}
            OutgoingEnd::Departed { .. } => {
                let ownership = self.ownership;
                self.depart();
                self.close_in_background(ownership);
            }
            OutgoingEnd::Lost => {
                let ownership = self.end_ownership();
                drop(self.take_phase());
                let what = "another owner has the VM".to_owned();
                self.stopped(StopReason::Failed { what });
                self.close_in_background(ownership);
            }
        }
    }

    /// Tells the volume that the writes of an ownership that has ended are complete.
    fn close_in_background(&self, ownership: Option<Ownership>) {
        let (Some(volume), Some(ownership)) = (self.volume.clone(), ownership) else {
            return;
        };
        let close = move || close(&volume, ownership);
        let spawned = std::thread::Builder::new()
            .name("close".to_owned())
            .spawn(close);
        if let Err(error) = spawned {
            tracing::warn!(%error, "cannot report the departure to the volume");
        }
    }

    fn incoming_ended(&mut self, end: IncomingEnd) {
        self.listening = None;
        match end {
            IncomingEnd::Running { .. } => {}
            IncomingEnd::Discarded { failure } => {
                drop(self.stop(StopReason::Failed { what: failure.text }));
            }
            IncomingEnd::Broken { what } => drop(self.stop(StopReason::Failed { what })),
        }
    }
}

fn close(volume: &VolumeClient, ownership: Ownership) {
    if let Err(error) = volume.close(ownership) {
        tracing::warn!(
            error = format_args!("{error:#}"),
            "cannot report the departure to the volume"
        );
    }
}

fn announce_again(actor: &ActorHandle) {
    for pause in ANNOUNCE_AGAIN {
        std::thread::sleep(pause);
        let announced = actor.migration(MigrationRequest::Announce);
        if let Ok(Err(error)) = announced {
            tracing::warn!(%error, "the guest's addresses were not announced");
        }
    }
}

fn ending(gone: ActorGone) -> String {
    gone.to_string()
}

#[cfg(test)]
mod tests {
    use bascule_devices::disk::{VolumeGate, WriteGate as _};
    use bascule_ipc::vm::VmState;
    use bascule_types::{Generation, SlotId, VolumeId};
    use bascule_volume_gate::{GateReader, GateWriter};

    use super::*;
    use crate::process::run_dir::RunDir;
    use crate::process::testing::config;
    use crate::testing::{COUNTER, TestVm, kvm_or_skip};

    /// The volume refuses the transfer of an unclean writer too, if the failure has reached it.
    #[test]
    fn i1_a_source_with_a_failed_write_requests_no_commit() {
        if !kvm_or_skip() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let page = folder.path().join("gate");
        let (_writer, _) = GateWriter::open(&page, VolumeId::random()).unwrap();
        let owner = Owner {
            slot: SlotId(1),
            generation: Generation(1),
        };
        let gate = VolumeGate::new(Arc::new(GateReader::open(&page).unwrap()), owner, None);
        let gate = Arc::new(gate);
        let run_dir = RunDir::of(&folder.path().join("config.json"));
        let (mut actor, _inbox) = VmActor::new(config(), run_dir).unwrap();
        actor.gate = Some(Arc::clone(&gate));
        let (vm, _test) = TestVm::with(COUNTER);
        actor.phase = Phase::Paused(vm);
        gate.write_failed();
        let refused = actor.mark_in_doubt().unwrap_err();
        assert_eq!(refused.to_string(), UNCLEAN);
        assert_eq!(actor.phase.state(), VmState::Paused, "it can run on here");

        // The control: with a gate through which every write succeeded.
        let clean = VolumeGate::new(Arc::new(GateReader::open(&page).unwrap()), owner, None);
        actor.gate = Some(Arc::new(clean));
        actor.mark_in_doubt().unwrap();
        assert_eq!(actor.phase.state(), VmState::InDoubt);
    }
}
