//! The owner of the machine: one thread, one inbox, and the only one who changes the phase.
//!
//! ```text
//!             boot     pause                    (migration)
//!  Starting ───────► Running ─► Pausing ─► Paused ──► InDoubt ──► Departed
//!     │ incoming        ▲          │       │ │           │
//!     └───────► Incoming┤          │       │ │           │
//!                  │    └──────────│───────┘ │           │
//!                  └───────────────┴─────────┴─► Ending ─┴─► Stopped(reason)
//! ```
//! Other threads never touch the machine's phase: they send a closure ([`OwnerHandle::call`]) that
//! runs here, between two other events. It must be short, and wait for nothing: every request on
//! `vm.sock` waits behind it. What takes as long as a disk, a device or the volume takes has a phase
//! of its own (`Starting`, `Pausing`, `Ending`), in which a thread of its own does it.

mod ending;
mod failing;
mod requests;
mod start;

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, bail};
use bascule_devices::disk::VolumeGate;
use bascule_devices::failure::DeviceFailure;
use bascule_ipc::vm::{LastState, StopReason, VmConfig, VmState, VmStatus};
use bascule_types::{Epoch, Owner as Tenant, Ownership};

pub(crate) use self::ending::Done;
use self::ending::Waiters;
pub(crate) use self::requests::Answer;
use super::devices::Devices;
use super::report::RunDir;
use super::volume::VolumeClient;
use crate::migration::MigrationControl;
use crate::{Console, MachineHandle, PausedVm, RunningVm};

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
    /// Its processors are being parked and its devices drained.
    Pausing(MachineHandle),
    /// The guest stands still.
    Paused(PausedVm),
    /// The commit request was sent, its outcome is unknown.
    InDoubt(PausedVm),
    /// The guest is off; its machine is being taken apart and its row given up. Until that is done
    /// it shows as what it was.
    Ending(VmState),
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
    /// The last one in which it was. What is said of a guest that has left or ended is said of it.
    last_tenure: Option<(Tenant, Epoch)>,
    /// The present or last migration.
    pub(crate) migration: Option<Arc<MigrationControl>>,
    pub(crate) listening: Option<SocketAddr>,
    /// What all writes to the home volume pass.
    pub(crate) gate: Option<Arc<VolumeGate>>,
    pub(crate) devices: Devices,
    run_dir: RunDir,
    console: Console,
    handle: OwnerHandle,
    notices: Arc<Mutex<Notices>>,
    /// Who waits for the guest to be paused.
    pausing: Waiters,
    /// Who waits for the guest to be off.
    stopping: Waiters,
    /// The guest is to be stopped as soon as it is built, or paused.
    stop_wanted: Option<StopReason>,
    exit: bool,
}

/// What device and processor threads leave for the owner.
#[derive(Debug, Default)]
struct Notices {
    /// Why the guest ended by itself.
    stop: Option<StopReason>,
    /// Disks that failed, and whose guest goes on.
    disk_failures: Vec<DeviceFailure>,
}

/// A way to the owner, for any thread.
#[derive(Clone, Debug)]
pub(crate) struct OwnerHandle {
    inbox_tx: SyncSender<Event>,
}

/// What the owner does next.
pub(crate) enum Event {
    /// There is something in [`Owner::notices`].
    Notice,
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

    /// Has `call` run on the owner's thread, without waiting for it.
    fn tell(&self, call: impl FnOnce(&mut Owner) + Send + 'static) {
        if self.inbox_tx.send(Event::Call(Box::new(call))).is_err() {
            tracing::debug!("the process ends anyway");
        }
    }

    /// Has the owner look at its notices, without ever waiting: with a full inbox it is about to
    /// look anyway.
    fn look(&self) {
        if let Err(TrySendError::Disconnected(_)) = self.inbox_tx.try_send(Event::Notice) {
            tracing::debug!("noticed while the process ends");
        }
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
            last_tenure: None,
            migration: None,
            listening: None,
            gate: None,
            devices: Devices::default(),
            run_dir,
            console: Console::with_log(log),
            handle: OwnerHandle { inbox_tx },
            notices: Arc::default(),
            pausing: Waiters::default(),
            stopping: Waiters::default(),
            stop_wanted: None,
            exit: false,
        };
        Ok((owner, inbox))
    }

    /// A way to this owner.
    pub(crate) fn handle(&self) -> OwnerHandle {
        self.handle.clone()
    }

    /// Serves the inbox until told to exit, and until nothing is left to be ended.
    pub(crate) fn serve(&mut self, inbox: &Receiver<Event>) {
        while !(self.exit && matches!(self.phase, Phase::Stopped(_) | Phase::Departed)) {
            match inbox.recv() {
                Ok(Event::Call(call)) => call(self),
                Ok(Event::Notice) => {}
                Err(_) => return,
            }
            self.heed_notices();
        }
    }

    /// Ends the process after the present event.
    pub(crate) const fn exit(&mut self) {
        self.exit = true;
    }

    /// A guest that ended by itself while it ran is stopped. One that did so in the instant in which
    /// it was paused for another reason is found stopped when it is resumed.
    fn heed_notices(&mut self) {
        let runs = matches!(self.phase, Phase::Running(_));
        let (stop, failures) = {
            let mut notices = lock(&self.notices);
            let stop = notices.stop.take_if(|_| runs);
            (stop, std::mem::take(&mut notices.disk_failures))
        };
        for failure in failures {
            self.disk_failed(&failure);
        }
        if let Some(reason) = stop {
            drop(self.stop(reason));
        }
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
                bail!(self.refusal());
            }
        }
        Ok(())
    }

    /// The guest runs elsewhere now: ends the machine without releasing a row that is no longer ours.
    pub(crate) fn depart(&mut self) {
        drop(self.take_phase());
        self.end_tenure();
        self.phase = Phase::Departed;
        self.run_dir.write_state(&LastState {
            uid: self.config.uid,
            state: VmState::Departed,
        });
        tracing::info!("departed");
    }

    /// This process is the VM's writer from now on. Whoever finds it silent, or killed, shall know so.
    pub(crate) fn begin_tenure(&mut self, (owner, epoch): (Tenant, Epoch)) {
        self.tenure = Some((owner, epoch));
        self.run_dir.write_ownership(&Ownership { owner, epoch });
    }

    /// This process is the VM's writer no more; returns the tenure that has ended.
    pub(crate) fn end_tenure(&mut self) -> Option<(Tenant, Epoch)> {
        self.last_tenure = self.tenure.or(self.last_tenure);
        self.tenure.take()
    }

    pub(crate) fn stopped(&mut self, reason: StopReason) {
        tracing::info!(?reason, "stopped");
        let state = VmState::Stopped(reason.clone());
        self.run_dir.write_state(&LastState {
            uid: self.config.uid,
            state,
        });
        self.phase = Phase::Stopped(reason);
        self.stopping.tell(&Ok(()));
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
            Phase::Pausing(machine) => Some(machine.clone()),
            Phase::Paused(vm) | Phase::Incoming(vm) | Phase::InDoubt(vm) => Some(vm.handle()),
            Phase::Starting | Phase::Ending(_) | Phase::Departed | Phase::Stopped(_) => None,
        }
    }

    /// What [`VmState`] it is. A phase that waits for something counts as the one before.
    pub(crate) fn state(&self) -> VmState {
        match &self.phase {
            Phase::Starting => VmState::Starting,
            Phase::Incoming(_) => VmState::Incoming,
            Phase::Running(_) | Phase::Pausing(_) => VmState::Running,
            Phase::Paused(_) => VmState::Paused,
            Phase::Ending(shown) => shown.clone(),
            Phase::InDoubt(_) => VmState::InDoubt,
            Phase::Departed => VmState::Departed,
            Phase::Stopped(reason) => VmState::Stopped(reason.clone()),
        }
    }

    /// What the present phase waits for, in words for a person; none when it waits for nothing.
    pub(crate) fn waits_for(&self) -> Option<String> {
        match &self.phase {
            Phase::Starting => Some("its volume, its kernel and its disks".to_owned()),
            Phase::Pausing(_) => Some(
                self.devices
                    .unanswered()
                    .unwrap_or_else(|| "its processors and devices".to_owned()),
            ),
            Phase::Ending(_) => Some("its home volume to release its row".to_owned()),
            _ => None,
        }
    }

    /// Why something is not possible now.
    pub(crate) fn refusal(&self) -> String {
        let name = self.phase_name();
        match self.waits_for() {
            Some(what) => format!("the guest is {name}: it waits for {what}"),
            None => format!("the guest is {name}"),
        }
    }

    /// The phase in a word.
    const fn phase_name(&self) -> &'static str {
        match self.phase {
            Phase::Starting => "starting",
            Phase::Incoming(_) => "coming in",
            Phase::Running(_) => "running",
            Phase::Pausing(_) => "being paused",
            Phase::Paused(_) => "paused",
            Phase::InDoubt(_) => "in doubt",
            Phase::Ending(_) => "being stopped",
            Phase::Departed => "departed",
            Phase::Stopped(_) => "stopped",
        }
    }

    /// The whole status.
    pub(crate) fn status(&self) -> VmStatus {
        let tenure = self.tenure.or(self.last_tenure).or_else(|| {
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

fn lock(notices: &Mutex<Notices>) -> MutexGuard<'_, Notices> {
    notices.lock().unwrap_or_else(PoisonError::into_inner)
}
