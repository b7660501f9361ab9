//! Migrations of this process's machine: what `vm.sock` orders, on a thread of its own.
//!
//! The machine stays with the [`Owner`]. The migration's thread sends it the few steps that a
//! migration takes, as calls like any other, and at the end what became of it.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bascule_ipc::vm::{MigrationLimits, StartMode, StopReason, VmConfig};
use bascule_types::{AttemptId, Epoch, Owner as Tenant, SavedStateRow, VmUid};

use super::owner::{Owner, OwnerHandle, Phase};
use super::volume::{Opened, VolumeClient};
use crate::migration::{
    Arrival, Guest, GuestError, Incoming, IncomingEnd, MigrationControl, Outgoing, OutgoingEnd,
    Quick, SavedArea, VolumeRow, migrate_live, migrate_quick, prefault, receive_live,
};
use crate::{MachineHandle, MachineState, PausedVm, migration};

/// When an arrived guest's place is announced again: switches may still be learning the old one.
const ANNOUNCE_AGAIN: [Duration; 3] = [
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_millis(800),
];

impl Owner {
    /// Begins a live migration to `peer`; how it goes is in the status.
    pub(super) fn migrate_live(
        &mut self,
        attempt: AttemptId,
        (peer, to): (SocketAddr, Tenant),
        limits: MigrationLimits,
    ) -> anyhow::Result<()> {
        if self.is_under_way(attempt) {
            return Ok(());
        }
        let (machine, job, control) = self.prepare(attempt, (peer, to), limits)?;
        let guest = OwnedGuest(self.handle());
        let (socket, uid) = self.home_socket()?;
        self.spawn_migration("migrate-out", &control, move |control| {
            let mut guest = guest;
            let mut row = connect(&socket, uid)?;
            let end = migrate_live(&mut guest, machine, &job, &mut row, control);
            guest
                .0
                .call(move |owner| owner.left(&end))
                .map_err(|_| GONE)?;
            Ok(())
        })
    }

    /// Begins a quick migration to `to`, or to whoever acquires the row next.
    pub(super) fn migrate_quick(
        &mut self,
        attempt: AttemptId,
        to: Option<Tenant>,
    ) -> anyhow::Result<()> {
        if self.is_under_way(attempt) {
            return Ok(());
        }
        let machine = self.movable()?;
        let tenure = self.tenure.context(NO_HOME)?;
        let gate = self.gate.clone().context(NO_HOME)?;
        let volume = self.volume.clone().context(NO_HOME)?;
        let job = Quick::new(&self.config, tenure, attempt, to)?;
        let (socket, uid) = self.home_socket()?;
        let control = Arc::new(MigrationControl::new(attempt));
        let mut guest = OwnedGuest(self.handle());
        self.spawn_migration("migrate-quick", &control, move |control| {
            let mut row = connect(&socket, uid)?;
            let area = |reserved: &SavedStateRow| {
                let (owner, epoch) = tenure;
                // Opening again what is open hands out the device once more.
                let opened = volume.open(owner, epoch);
                let opened = opened.map_err(|error| format!("{error:#}"))?;
                Ok(SavedArea {
                    device: opened.device,
                    extents: reserved.extents.clone(),
                    gate: Some(gate),
                })
            };
            let end = migrate_quick(&mut guest, &machine, &job, &mut row, area, control);
            let left = guest.0.call(move |owner| owner.left(&end));
            left.map_err(|_| GONE.to_owned())
        })
    }

    /// The running machine, if nothing is under way with it.
    fn movable(&self) -> anyhow::Result<MachineHandle> {
        self.no_migration()?;
        match &self.phase {
            Phase::Running(vm) => Ok(vm.handle()),
            _ => bail!(self.refusal()),
        }
    }

    fn prepare(
        &self,
        attempt: AttemptId,
        (peer, to): (SocketAddr, Tenant),
        limits: MigrationLimits,
    ) -> anyhow::Result<(MachineHandle, Outgoing, Arc<MigrationControl>)> {
        let machine = self.movable()?;
        let tenure = self.tenure.context(NO_HOME)?;
        let job = Outgoing::new(&self.config, tenure, (attempt, peer, to), limits)?;
        Ok((machine, job, Arc::new(MigrationControl::new(attempt))))
    }

    /// Whether this very attempt runs: whoever orders it again, as an operator does that took over
    /// from another, has what it wants.
    fn is_under_way(&self, attempt: AttemptId) -> bool {
        let mut present = self.migration.iter();
        present.any(|control| !control.has_ended() && control.status().attempt == attempt)
    }

    /// Refuses what a migration under way forbids.
    pub(super) fn no_migration(&self) -> anyhow::Result<()> {
        match &self.migration {
            Some(control) if !control.has_ended() => bail!("a migration is under way"),
            _ => Ok(()),
        }
    }

    /// Calls a migration off.
    pub(super) fn cancel_migration(&self, attempt: AttemptId) -> anyhow::Result<()> {
        let control = self.migration.as_ref().context("there is no migration")?;
        if control.status().attempt != attempt {
            bail!("another attempt is the present one");
        }
        if !control.cancel() {
            bail!("it is too late: the migration is over, or its commit was asked for");
        }
        Ok(())
    }

    /// Waits for a migration, with the machine built.
    pub(super) fn await_arrival(&mut self, machine: MachineHandle) -> anyhow::Result<()> {
        let StartMode::Incoming { listen, attempt } = self.config.start else {
            bail!("start: not incoming");
        };
        let job = Incoming::new(&self.config, attempt)?;
        let volume = self.volume.clone().context("the VM has no home volume")?;
        let control = Arc::new(MigrationControl::new(attempt));
        let owner = self.handle();
        let (socket, uid) = self.home_socket()?;
        self.spawn_migration("migrate-in", &control, move |control| {
            prefault(&machine).map_err(|error| format!("no memory for the guest: {error}"))?;
            let listener = TcpListener::bind(listen)
                .map_err(|error| format!("cannot listen on {listen}: {error}"))?;
            let address = listener.local_addr().ok();
            let mut row = connect(&socket, uid)?;
            owner
                .call(move |owner| owner.listening = address)
                .map_err(|_| GONE)?;
            let mut guest = OwnedArrival {
                owner: owner.clone(),
                volume,
            };
            let end = receive_live(&listener, &mut guest, &machine, &job, &mut row, control);
            drop(listener);
            let arrived = matches!(end, IncomingEnd::Running { .. });
            owner
                .call(move |owner| owner.arrived(end))
                .map_err(|_| GONE)?;
            if arrived {
                announce_again(&owner);
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
        let owner = self.handle();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let Err(what) = run(&thread) else {
                    return;
                };
                tracing::error!(what, "the migration cannot go on");
                thread.fail(what.clone());
                let ended = owner.call(move |owner| {
                    if let Phase::Incoming(_) = owner.phase {
                        drop(owner.stop(StopReason::Failed { what }));
                    }
                });
                if ended.is_err() {
                    tracing::debug!("the process ends anyway");
                }
            })
            .context("start a thread")?;
        self.migration = Some(Arc::clone(control));
        Ok(())
    }

    /// Where the VM's row is asked for.
    fn home_socket(&self) -> anyhow::Result<(PathBuf, VmUid)> {
        let home = self.config.home.as_ref();
        let home = home.context("the VM has no home volume")?;
        Ok((home.socket.clone(), self.config.uid))
    }

    /// What became of a machine that was to leave.
    fn left(&mut self, end: &OutgoingEnd) {
        match end {
            OutgoingEnd::Kept { tenure, .. } => {
                if let Some((owner, epoch)) = *tenure {
                    self.begin_tenure((owner, epoch));
                    if let Some(gate) = &self.gate {
                        gate.set_owner(owner);
                    }
                }
            }
            OutgoingEnd::Departed { .. } => {
                let tenure = self.tenure;
                self.depart();
                self.close_in_background(tenure);
            }
            OutgoingEnd::Lost => {
                let tenure = self.end_tenure();
                drop(self.take_phase());
                let what = "the VM's row is somebody else's".to_owned();
                self.stopped(StopReason::Failed { what });
                self.close_in_background(tenure);
            }
        }
    }

    /// Tells the volume that a machine that is gone writes nothing any more.
    fn close_in_background(&self, tenure: Option<(Tenant, Epoch)>) {
        let (Some(volume), Some((owner, epoch))) = (self.volume.clone(), tenure) else {
            return;
        };
        let close = move || {
            if let Err(error) = volume.close(owner, epoch) {
                tracing::warn!(
                    error = format_args!("{error:#}"),
                    "the volume was not told of the departure"
                );
            }
        };
        let spawned = std::thread::Builder::new()
            .name("close".to_owned())
            .spawn(close);
        if let Err(error) = spawned {
            tracing::warn!(%error, "the volume was not told of the departure");
        }
    }

    /// What became of a machine that was to arrive.
    fn arrived(&mut self, end: IncomingEnd) {
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

/// Puts the saved state into the machine that was built for it.
pub(super) fn restore_saved(
    config: &VmConfig,
    tenure: Option<(Tenant, Epoch)>,
    vm: &mut PausedVm,
    opened: Option<&Opened>,
) -> anyhow::Result<()> {
    let opened = opened.context(NO_HOME)?;
    let tenure = tenure.context(NO_HOME)?;
    let saved = opened.saved.as_ref();
    let saved = saved.context("start: the volume has no saved state of this VM")?;
    let area = SavedArea {
        device: Arc::clone(&opened.device),
        extents: saved.extents.clone(),
        gate: None,
    };
    let home = config.home.as_ref().context(NO_HOME)?;
    let mut row = connect(&home.socket, config.uid).map_err(anyhow::Error::msg)?;
    migration::restore_saved(vm, config, tenure, saved, area, &mut row)?;
    Ok(())
}

/// Why there is nothing to move.
const NO_HOME: &str =
    "the VM has no home volume: only its row there could say on which side it may run";
/// What a call to an owner that is gone amounts to.
const GONE: &str = "the process is ending";

fn connect(socket: &Path, vm: VmUid) -> Result<VolumeRow, String> {
    VolumeRow::connect(socket, vm).map_err(|error| format!("{:#}", anyhow::Error::from(error)))
}

fn announce_again(owner: &OwnerHandle) {
    for pause in ANNOUNCE_AGAIN {
        std::thread::sleep(pause);
        let announced = owner.call(|owner| owner.devices.announce());
        if let Ok(Err(error)) = announced {
            tracing::warn!(%error, "the guest's place was not announced");
        }
    }
}

/// The machine of an [`Owner`], for a migration away.
struct OwnedGuest(OwnerHandle);

impl OwnedGuest {
    fn ask<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Owner) -> anyhow::Result<T> + Send + 'static,
    ) -> Result<T, GuestError> {
        ask(&self.0, call)
    }
}

impl Guest for OwnedGuest {
    fn pause(&mut self) -> Result<(), GuestError> {
        let done = self.ask(Owner::pause)?;
        let paused = done.recv().map_err(|_| GuestError(GONE.to_owned()))?;
        paused.map_err(GuestError)
    }

    fn save(&mut self) -> Result<Vec<u8>, GuestError> {
        self.ask(|owner| match &owner.phase {
            Phase::Paused(vm) => Ok(vm.save()?.encode()?),
            _ => bail!(owner.refusal()),
        })
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.ask(|owner| match owner.phase {
            Phase::Running(_) => Ok(()),
            _ => owner.resume(),
        })
    }

    fn doubt(&mut self) -> Result<(), GuestError> {
        self.ask(|owner| match owner.take_phase() {
            Phase::Paused(vm) => {
                owner.phase = Phase::InDoubt(vm);
                Ok(())
            }
            phase => {
                owner.phase = phase;
                bail!(owner.refusal())
            }
        })
    }
}

/// The machine of an [`Owner`] that is to arrive.
struct OwnedArrival {
    owner: OwnerHandle,
    volume: Arc<VolumeClient>,
}

impl Arrival for OwnedArrival {
    fn restore(&mut self, state: &[u8]) -> Result<(), GuestError> {
        let state = MachineState::decode(state).map_err(|error| GuestError(error.to_string()))?;
        ask(&self.owner, |owner| match &mut owner.phase {
            Phase::Incoming(vm) => Ok(vm.restore(state)?),
            _ => bail!(owner.refusal()),
        })
    }

    fn take_over(&mut self, tenant: Tenant, epoch: Epoch) -> Result<(), GuestError> {
        self.volume
            .open(tenant, epoch)
            .map_err(|error| GuestError(format!("{error:#}")))?;
        ask(&self.owner, move |owner| {
            if let Some(gate) = &owner.gate {
                gate.set_owner(tenant);
            }
            owner.begin_tenure((tenant, epoch));
            Ok(())
        })
    }

    fn announce(&mut self) {
        let announced = ask(&self.owner, |owner| Ok(owner.devices.announce()?));
        if let Err(error) = announced {
            tracing::warn!(%error, "the guest's place was not announced");
        }
    }

    fn run(&mut self) -> Result<(), GuestError> {
        ask(&self.owner, |owner| match owner.phase {
            Phase::Incoming(_) => owner.resume(),
            _ => bail!(owner.refusal()),
        })
    }
}

fn ask<T: Send + 'static>(
    owner: &OwnerHandle,
    call: impl FnOnce(&mut Owner) -> anyhow::Result<T> + Send + 'static,
) -> Result<T, GuestError> {
    match owner.call(call) {
        Ok(done) => done.map_err(|error| GuestError(format!("{error:#}"))),
        Err(gone) => Err(GuestError(gone.to_string())),
    }
}
