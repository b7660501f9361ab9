//! The owner of the machine: one thread, one inbox, and the only one who changes the phase.
//!
//! ```text
//!             boot            pause             (migration)
//!  Starting ───────► Running ⇄ Paused ──► InDoubt ──► Departed
//!     │ incoming        │        │           │
//!     └───────► Incoming┴────────┴───────────┴──► Stopped(reason)
//! ```
//! Other threads never touch the machine's phase: they send a closure ([`OwnerHandle::call`]) that
//! runs here, between two other events. It must be short: status requests wait behind it.

mod requests;

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, bail};
use bascule_devices::disk::VolumeGate;
use bascule_ipc::vm::{StartMode, StopReason, VmConfig, VmState, VmStatus};
use bascule_types::{Epoch, Owner as Tenant};

use super::devices::{self, Devices};
use super::report::{LastState, RunDir};
use super::volume::{Opened, VolumeClient};
use super::{images, tenure};
use crate::migration::MigrationControl;
use crate::{Console, MachineHandle, PausedVm, RunningVm, VmBuilder};

/// Events that wait for the owner: connections are bounded and each has one request out.
const INBOX_LENGTH: usize = 64;

/// Where the machine stands, with what exists of it there.
#[derive(Debug)]
pub(crate) enum Phase {
    /// Being built.
    Starting,
    /// Built, waiting for a migration.
    Incoming(PausedVm),
    /// The guest runs.
    Running(RunningVm),
    /// The guest stands still.
    Paused(PausedVm),
    /// The commit request was sent, its outcome is unknown.
    InDoubt(PausedVm),
    /// The guest runs elsewhere.
    Departed,
    /// The guest is off.
    Stopped(StopReason),
}

/// The machine, its volume, and everything that its status shows.
#[derive(Debug)]
pub(crate) struct Owner {
    pub(crate) config: VmConfig,
    pub(crate) phase: Phase,
    pub(crate) volume: Option<Arc<VolumeClient>>,
    /// The tenure in which this process is the VM's writer on the volume.
    pub(crate) tenure: Option<(Tenant, Epoch)>,
    /// The present or last migration.
    pub(crate) migration: Option<Arc<MigrationControl>>,
    pub(crate) listening: Option<SocketAddr>,
    /// What all writes to the home volume pass.
    pub(crate) gate: Option<Arc<VolumeGate>>,
    pub(crate) devices: Devices,
    run_dir: RunDir,
    console: Console,
    handle: OwnerHandle,
    guest_stop: Arc<Mutex<Option<StopReason>>>,
    exit: bool,
}

/// A way to the owner, for any thread.
#[derive(Clone, Debug)]
pub(crate) struct OwnerHandle {
    inbox_tx: SyncSender<Event>,
}

/// What the owner does next.
pub(crate) enum Event {
    /// The guest ended by itself: see [`Owner::guest_stop`].
    GuestStopped,
    /// Something that another thread wants done.
    Call(Box<dyn FnOnce(&mut Owner) + Send>),
}

/// The owner is gone: the process is ending.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the process is ending")]
pub(crate) struct OwnerGone;

impl OwnerHandle {
    /// Runs `call` on the owner's thread and returns what it returns.
    pub(crate) fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Owner) -> T + Send + 'static,
    ) -> Result<T, OwnerGone> {
        let (reply_tx, reply_rx) = sync_channel(1);
        let event = Event::Call(Box::new(move |owner| {
            if reply_tx.send(call(owner)).is_err() {
                tracing::debug!("nobody awaits an answer any more");
            }
        }));
        self.inbox_tx.send(event).map_err(|_| OwnerGone)?;
        reply_rx.recv().map_err(|_| OwnerGone)
    }
}

impl Owner {
    /// An owner of nothing yet, and its inbox.
    pub(crate) fn new(
        config: VmConfig,
        run_dir: RunDir,
    ) -> anyhow::Result<(Self, Receiver<Event>)> {
        let (inbox_tx, inbox) = sync_channel(INBOX_LENGTH);
        let log = run_dir.console_log().context("open the console log")?;
        let volume = config
            .home
            .as_ref()
            .map(|home| Arc::new(VolumeClient::new(home.socket.clone(), config.uid)));
        let owner = Self {
            config,
            phase: Phase::Starting,
            volume,
            tenure: None,
            migration: None,
            listening: None,
            gate: None,
            devices: Devices::default(),
            run_dir,
            console: Console::with_log(log),
            handle: OwnerHandle { inbox_tx },
            guest_stop: Arc::default(),
            exit: false,
        };
        Ok((owner, inbox))
    }

    /// A way to this owner.
    pub(crate) fn handle(&self) -> OwnerHandle {
        self.handle.clone()
    }

    /// Builds the machine and begins as configured. A failure is a state, not an end: the starter
    /// shall be able to ask why.
    pub(crate) fn start(&mut self) {
        if let Err(error) = self.try_start() {
            let what = format!("{error:#}");
            tracing::error!(what, "cannot start");
            self.stop(StopReason::Failed { what });
        }
    }

    fn try_start(&mut self) -> anyhow::Result<()> {
        let mut opened = self.open_home()?;
        self.gate = self.open_gate(opened.as_mut())?;
        let home = opened.as_ref().zip(self.gate.as_ref());
        let mut builder = self.builder()?;
        self.devices = devices::add(&mut builder, &self.config, home)?;
        match self.config.start {
            StartMode::Boot => {
                let source = images::open(&self.config.boot, opened.as_ref())?;
                let vm = builder.boot(source)?.run()?;
                tracing::info!("the guest runs");
                self.phase = Phase::Running(vm);
            }
            StartMode::Incoming { .. } => {
                let vm = builder.incoming()?;
                let machine = vm.handle();
                self.phase = Phase::Incoming(vm);
                self.await_arrival(machine)?;
            }
            StartMode::Restore => {
                let mut vm = builder.incoming()?;
                self.restore_saved(&mut vm, opened.as_ref())?;
                if let Err(error) = self.devices.announce() {
                    tracing::warn!(%error, "the guest's place was not announced");
                }
                self.phase = Phase::Running(vm.run()?);
            }
        }
        Ok(())
    }

    fn open_home(&mut self) -> anyhow::Result<Option<Opened>> {
        let (Some(volume), Some(home)) = (&self.volume, &self.config.home) else {
            return Ok(None);
        };
        if let StartMode::Incoming { .. } = self.config.start {
            return volume.peek().map(Some);
        }
        let opened = volume.open(home.owner, home.epoch)?;
        self.tenure = Some((home.owner, home.epoch));
        Ok(Some(opened))
    }

    /// The home volume's gate, and the thread that watches it.
    fn open_gate(&self, opened: Option<&mut Opened>) -> anyhow::Result<Option<Arc<VolumeGate>>> {
        let (Some(opened), Some(volume), Some(home)) = (opened, &self.volume, &self.config.home)
        else {
            return Ok(None);
        };
        let gate = Arc::new(VolumeGate::new(Arc::new(opened.take_gate()?), home.owner));
        tenure::watch(Arc::clone(&gate), Arc::clone(volume), self.handle())
            .context("watch the gate")?;
        Ok(Some(gate))
    }

    fn builder(&self) -> anyhow::Result<VmBuilder> {
        let stop = Arc::clone(&self.guest_stop);
        let inbox_tx = self.handle.inbox_tx.clone();
        let on_stop = move |reason| {
            stop.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(reason);
            // With a full inbox the owner is about to look anyway.
            if let Err(TrySendError::Disconnected(_)) = inbox_tx.try_send(Event::GuestStopped) {
                tracing::debug!("the guest stopped while the process ends");
            }
        };
        let cpus = u32::from(self.config.cpus);
        let console = self.console.clone();
        Ok(VmBuilder::new(cpus, self.config.memory, console, on_stop)?)
    }

    /// Serves the inbox until told to exit.
    pub(crate) fn serve(&mut self, inbox: &Receiver<Event>) {
        while !self.exit {
            match inbox.recv() {
                Ok(Event::Call(call)) => call(self),
                Ok(Event::GuestStopped) => {}
                Err(_) => return,
            }
            self.notice_guest_stop();
        }
    }

    /// Ends the process after the present event.
    pub(crate) const fn exit(&mut self) {
        self.exit = true;
    }

    /// A guest that ended by itself while it ran is stopped. One that did so in the instant in which
    /// it was paused for another reason is found stopped when it is resumed.
    fn notice_guest_stop(&mut self) {
        if !matches!(self.phase, Phase::Running(_)) {
            return;
        }
        let reason = self
            .guest_stop
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(reason) = reason {
            self.stop(reason);
        }
    }

    /// Pauses a running guest.
    pub(crate) fn pause(&mut self) -> anyhow::Result<()> {
        match self.take_phase() {
            Phase::Running(vm) => match vm.pause() {
                Ok(vm) => self.phase = Phase::Paused(vm),
                Err(error) => {
                    let what = format!("pause: {error}");
                    self.stopped(StopReason::Failed { what: what.clone() });
                    bail!(what);
                }
            },
            phase => {
                self.phase = phase;
                bail!("the guest is {}", self.phase_name());
            }
        }
        Ok(())
    }

    /// Lets a guest that stands still run: paused, restored, or no longer in doubt.
    pub(crate) fn resume(&mut self) -> anyhow::Result<()> {
        match self.take_phase() {
            Phase::Paused(vm) | Phase::Incoming(vm) | Phase::InDoubt(vm) => match vm.run() {
                Ok(vm) => self.phase = Phase::Running(vm),
                Err(error) => {
                    let what = format!("resume: {error}");
                    self.stopped(StopReason::Failed { what: what.clone() });
                    bail!(what);
                }
            },
            phase => {
                self.phase = phase;
                bail!("the guest is {}", self.phase_name());
            }
        }
        Ok(())
    }

    /// Ends the machine: drains its devices, gives the row up, and stays to tell why.
    pub(crate) fn stop(&mut self, reason: StopReason) {
        match self.take_phase() {
            Phase::Running(vm) => match vm.pause() {
                Ok(vm) => vm.end(),
                Err(error) => tracing::error!(%error, "stop"),
            },
            Phase::Paused(vm) | Phase::Incoming(vm) => vm.end(),
            Phase::Starting => {}
            // Nobody but the volume decides about a guest in doubt, and a departed or stopped one
            // has nothing left to end.
            phase @ (Phase::InDoubt(_) | Phase::Departed | Phase::Stopped(_)) => {
                self.phase = phase;
                return;
            }
        }
        self.release();
        self.stopped(reason);
    }

    /// The guest runs elsewhere now: ends the machine without releasing a row that is no longer ours.
    pub(crate) fn depart(&mut self) {
        drop(self.take_phase());
        self.tenure = None;
        self.phase = Phase::Departed;
        self.run_dir.write_state(&LastState {
            uid: self.config.uid,
            state: VmState::Departed,
        });
        tracing::info!("departed");
    }

    pub(crate) fn stopped(&mut self, reason: StopReason) {
        tracing::info!(?reason, "stopped");
        let state = VmState::Stopped(reason.clone());
        self.run_dir.write_state(&LastState {
            uid: self.config.uid,
            state,
        });
        self.phase = Phase::Stopped(reason);
    }

    /// Leaves `what` in `state.json`, for a process that ends without stopping its guest.
    pub(crate) fn record_failure(&self, what: String) {
        let state = VmState::Stopped(StopReason::Failed { what });
        self.run_dir.write_state(&LastState {
            uid: self.config.uid,
            state,
        });
    }

    /// Takes the phase out, to be replaced in the same step.
    pub(crate) fn take_phase(&mut self) -> Phase {
        std::mem::replace(&mut self.phase, Phase::Starting)
    }

    /// The machine's handle, while there is a machine.
    pub(crate) fn machine(&self) -> Option<MachineHandle> {
        match &self.phase {
            Phase::Running(vm) => Some(vm.handle()),
            Phase::Paused(vm) | Phase::Incoming(vm) | Phase::InDoubt(vm) => Some(vm.handle()),
            Phase::Starting | Phase::Departed | Phase::Stopped(_) => None,
        }
    }

    /// What [`VmState`] it is.
    pub(crate) fn state(&self) -> VmState {
        match &self.phase {
            Phase::Starting => VmState::Starting,
            Phase::Incoming(_) => VmState::Incoming,
            Phase::Running(_) => VmState::Running,
            Phase::Paused(_) => VmState::Paused,
            Phase::InDoubt(_) => VmState::InDoubt,
            Phase::Departed => VmState::Departed,
            Phase::Stopped(reason) => VmState::Stopped(reason.clone()),
        }
    }

    /// The phase in a word, for refusals.
    pub(crate) const fn phase_name(&self) -> &'static str {
        match self.phase {
            Phase::Starting => "starting",
            Phase::Incoming(_) => "coming in",
            Phase::Running(_) => "running",
            Phase::Paused(_) => "paused",
            Phase::InDoubt(_) => "in doubt",
            Phase::Departed => "departed",
            Phase::Stopped(_) => "stopped",
        }
    }

    /// The whole status.
    pub(crate) fn status(&self) -> VmStatus {
        let tenure = self.tenure.or_else(|| {
            self.config
                .home
                .as_ref()
                .map(|home| (home.owner, home.epoch))
        });
        VmStatus {
            uid: self.config.uid,
            release: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            state: self.state(),
            owner: tenure.map(|(owner, _)| owner),
            epoch: tenure.map_or_else(Epoch::default, |(_, epoch)| epoch),
            listening: self.listening,
            migration: self.migration.as_ref().map(|control| control.status()),
            io_stalled: self.devices.io_stalled(),
            addresses: Vec::new(),
        }
    }
}
