//! The actor's state, its event loop, and the status that it reports.

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context as _, bail};
use bascule_devices::disk::VolumeGate;
use bascule_ipc::vm::{DiskError, LastState, PanicStatus, StopReason, VmConfig, VmState, VmStatus};
use bascule_types::{Epoch, Ownership};

use super::event::{ActorHandle, Done, Event, OwnershipRequest, TaskOutcome};
use super::host_shutdown_progress::Progress;
use super::notices::Notices;
use super::phase::Phase;
use super::reset_wait::Resets;
use crate::guest_agent::AgentHandle;
use crate::kvm::KvmError;
use crate::process::devices::Devices;
use crate::process::home_volume::VolumeClient;
use crate::process::run_dir::RunDir;
use crate::pvpanic::Pvpanic;
use crate::{Console, PausedVm, migration::MigrationControl};

/// The machine, its home volume, and what its status shows.
#[derive(Debug)]
pub(crate) struct VmActor {
    pub(super) config: VmConfig,
    pub(super) phase: Phase,
    /// The client of the home volume; none without a home volume.
    pub(super) volume: Option<Arc<VolumeClient>>,
    /// The ownership in which this process is the VM's writer on the volume.
    pub(super) ownership: Option<Ownership>,
    /// The last such ownership. The status of a guest that has departed or stopped shows it.
    last_ownership: Option<Ownership>,
    /// The present or the last migration.
    pub(super) migration: Option<Arc<MigrationControl>>,
    /// Where an incoming migration is awaited.
    pub(super) listening: Option<SocketAddr>,
    /// Passed by every write to the home volume.
    pub(super) gate: Option<Arc<VolumeGate>>,
    pub(super) devices: Devices,
    /// What the guest's kernel has told of its panics; none before the machine is built.
    pub(super) pvpanic: Option<Arc<Pvpanic>>,
    /// The error for which the guest is paused, or about to be.
    pub(super) disk_error: Option<DiskError>,
    pub(super) run_dir: RunDir,
    pub(super) console: Console,
    handle: ActorHandle,
    pub(super) notices: Arc<Mutex<Notices>>,
    /// Requests that wait for the guest to be paused.
    pub(super) pausing: Waiters,
    /// Requests that wait for the guest to be stopped.
    pub(super) stopping: Waiters,
    /// What the guest is being paused for; none when only because it has ended or is to be stopped.
    pub(super) pause_for: Option<PauseFor>,
    /// The guest is to be stopped as soon as it is built, paused or reset.
    pub(super) stop_wanted: Option<StopReason>,
    pub(super) resets: Resets,
    /// Why the present reset is delayed, and the number of that delay.
    pub(super) reset_waits: Option<String>,
    pub(super) delayed: u64,
    /// The progress of a shutdown of the host.
    pub(super) host_shutdown: Progress,
    pub(super) exit: bool,
}

/// What a guest is paused for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PauseFor {
    /// A request on `vm.sock`.
    Request,
    /// A step of a migration.
    Migration,
    /// A disk holds a request back.
    DiskError,
}

/// Requests that wait for one change.
#[derive(Debug, Default)]
pub(super) struct Waiters(Vec<SyncSender<Result<(), String>>>);

impl Waiters {
    /// One more; it receives the outcome through what is returned.
    pub(super) fn join(&mut self) -> Done {
        let (done_tx, done_rx) = sync_channel(1);
        self.0.push(done_tx);
        done_rx
    }

    /// Ends the wait of all.
    pub(super) fn finish(&mut self, outcome: &Result<(), String>) {
        for waiter in self.0.drain(..) {
            if waiter.send(outcome.clone()).is_err() {
                tracing::debug!("the requester does not wait for the outcome any more");
            }
        }
    }
}

impl VmActor {
    /// An actor without a machine, and its inbox.
    pub(crate) fn new(
        config: VmConfig,
        run_dir: RunDir,
    ) -> anyhow::Result<(Self, Receiver<Event>)> {
        let (handle, inbox) = ActorHandle::channel();
        let console = run_dir.console_log().and_then(Console::with_log);
        let console = console.context("open the console log")?;
        let volume = config
            .home
            .as_ref()
            .map(|home| Arc::new(VolumeClient::new(home.socket.clone(), config.uid)));
        let actor = Self {
            config,
            phase: Phase::Starting,
            volume,
            ownership: None,
            last_ownership: None,
            migration: None,
            listening: None,
            gate: None,
            devices: Devices::default(),
            pvpanic: None,
            disk_error: None,
            run_dir,
            console,
            handle,
            notices: Arc::default(),
            pausing: Waiters::default(),
            stopping: Waiters::default(),
            pause_for: None,
            stop_wanted: None,
            resets: Resets::new(Instant::now()),
            reset_waits: None,
            delayed: 0,
            host_shutdown: Progress::default(),
            exit: false,
        };
        Ok((actor, inbox))
    }

    /// A handle for other threads.
    pub(crate) fn handle(&self) -> ActorHandle {
        self.handle.clone()
    }

    /// Applies events until the process is to exit.
    pub(crate) fn serve(&mut self, inbox: &Receiver<Event>) {
        while let Some(event) = self.select(inbox) {
            tracing::debug!(?event, phase = self.phase.name(), "event");
            self.apply(event);
        }
    }

    /// The next event; none once an exit was requested and the guest is stopped or departed.
    fn select(&self, inbox: &Receiver<Event>) -> Option<Event> {
        if self.exit && matches!(self.phase, Phase::Stopped(_) | Phase::Departed) {
            return None;
        }
        inbox.recv().ok()
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Notices => {}
            Event::Control(request, reply) => reply.send(self.control_request(&request)),
            Event::Exit(reply) => {
                self.exit = true;
                reply.send(());
            }
            Event::PowerButton(reply) => {
                if let Err(error) = self.press_power_button() {
                    let error = format_args!("{error:#}");
                    tracing::info!(error, "the power button is not pressed");
                }
                reply.send(());
            }
            Event::HostShutdown(why, reply) => {
                self.host_shuts_down(why);
                reply.send(());
            }
            Event::Task(TaskOutcome::Built(ownership, built)) => self.built(ownership, built),
            Event::Task(TaskOutcome::Parked(paused)) => self.parked(paused),
            Event::Task(TaskOutcome::Reset(reset)) => self.reset_done(reset),
            Event::Task(TaskOutcome::ResetDue(number)) => self.reset_due(number),
            Event::Task(TaskOutcome::Ended(reason)) => self.stopped(reason),
            Event::Migration(request) => self.migration_request(request),
            Event::Ownership(request) => self.ownership_request(request),
        }
        self.process_notices();
        self.continue_host_shutdown();
    }

    fn ownership_request(&mut self, request: OwnershipRequest) {
        match request {
            OwnershipRequest::Get(reply) => reply.send(self.ownership),
            OwnershipRequest::Adopt(ownership, reply) => {
                let owned = self
                    .ownership
                    .is_some_and(|present| present.epoch == ownership.epoch);
                if owned {
                    self.begin_ownership(ownership);
                }
                reply.send(owned);
            }
            OwnershipRequest::Lost(what, reply) => {
                if self.ownership.is_some() {
                    self.record_failure(what);
                }
                reply.send(self.ownership.is_some());
            }
        }
    }

    /// Runs the guest of a paused or restored machine, or of one whose commit request was refused. One that
    /// is to be reset begins anew.
    ///
    /// # Errors
    /// When there is no such guest, or it has ended by itself: [`Self::process_notices`] then ends it.
    pub(super) fn resume(&mut self) -> anyhow::Result<()> {
        self.phase = match self.take_phase() {
            Phase::InDoubt(vm) => Phase::Paused(vm),
            phase => phase,
        };
        self.refuse_ended()?;
        match (self.take_phase(), self.take_reset()) {
            (Phase::Paused(vm), Some(cause)) => self.reset(vm, cause),
            (Phase::Paused(vm) | Phase::Incoming(vm), _) => {
                if let Err(error) = self.run(vm) {
                    let what = format!("resume: {error}");
                    self.stopped(StopReason::Failed { what: what.clone() });
                    bail!(what);
                }
            }
            (phase, _) => {
                self.phase = phase;
                bail!(self.refusal());
            }
        }
        Ok(())
    }

    /// Runs the guest of a machine that was built, restored, paused or reset.
    ///
    /// # Errors
    /// When the machine cannot be used again; the caller sets the next phase.
    pub(super) fn run(&mut self, vm: PausedVm) -> Result<(), KvmError> {
        self.resets.count = vm.resets();
        self.phase = Phase::Running(vm.run()?);
        self.disk_error = None;
        Ok(())
    }

    /// Ends a machine whose guest runs on another node now. The ownership is not released: it is
    /// that node's.
    pub(super) fn depart(&mut self) {
        drop(self.take_phase());
        self.end_ownership();
        self.phase = Phase::Departed;
        self.end_agent();
        self.console.detach_followers();
        self.write_state(VmState::Departed);
        tracing::info!("departed");
    }

    /// This process is the VM's writer from now on. The ownership is also left in the run directory,
    /// for `bascule-node` to read when this process was killed or does not respond.
    pub(super) fn begin_ownership(&mut self, ownership: Ownership) {
        self.ownership = Some(ownership);
        self.run_dir.write_ownership(&ownership);
    }

    /// This process is not the VM's writer any more; returns the ownership that has ended.
    pub(super) fn end_ownership(&mut self) -> Option<Ownership> {
        self.last_ownership = self.ownership.or(self.last_ownership);
        self.ownership.take()
    }

    /// The guest is off and the machine gone.
    pub(super) fn stopped(&mut self, reason: StopReason) {
        tracing::info!(?reason, "stopped");
        self.write_state(VmState::Stopped(reason.clone()));
        self.phase = Phase::Stopped(reason);
        self.end_agent();
        self.console.detach_followers();
        self.stopping.finish(&Ok(()));
    }

    fn end_agent(&self) {
        if let Some(agent) = &self.devices.agent {
            agent.end();
        }
    }

    /// Leaves the failure `what` in `state.json`, for a process that exits without stopping its guest.
    fn record_failure(&self, what: String) {
        self.write_state(VmState::Stopped(StopReason::Failed { what }));
    }

    fn write_state(&self, state: VmState) {
        self.run_dir.write_state(&LastState {
            uid: self.config.uid,
            state,
        });
    }

    /// Takes the phase out; the caller sets the next one before it returns.
    pub(super) fn take_phase(&mut self) -> Phase {
        std::mem::replace(&mut self.phase, Phase::Starting)
    }

    /// What the present phase waits for, for the user; none when it waits for nothing.
    pub(super) fn waits_for(&self) -> Option<String> {
        match &self.phase {
            Phase::Starting => Some("its volume, its kernel and its disks".to_owned()),
            Phase::Pausing(_) => Some(
                self.devices
                    .unanswered()
                    .unwrap_or_else(|| "its vCPUs and devices".to_owned()),
            ),
            Phase::Resetting(_) => Some("its kernel to be loaded again".to_owned()),
            Phase::ResetDelayed(_) => self.reset_waits.clone(),
            Phase::Ending(_) => Some("its home volume to release its ownership".to_owned()),
            _ => None,
        }
    }

    /// Why a request is refused in the present phase.
    pub(super) fn refusal(&self) -> String {
        let name = self.phase.name();
        match self.waits_for() {
            Some(what) => format!("the guest is {name}: it waits for {what}"),
            None => format!("the guest is {name}"),
        }
    }

    pub(super) fn status(&self) -> VmStatus {
        let ownership = self.ownership.or(self.last_ownership).or_else(|| {
            let home = self.config.home.as_ref()?;
            Some(Ownership::new(home.owner, home.epoch))
        });
        VmStatus {
            uid: self.config.uid,
            release: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            state: self.phase.state(),
            owner: ownership.map(|ownership| ownership.owner),
            epoch: ownership.map_or_else(Epoch::default, |ownership| ownership.epoch),
            listening: self.listening,
            migration: self.migration.as_ref().map(|control| control.status()),
            io_stalled: self.devices.io_stalled(),
            addresses: Vec::new(),
            disk_error: self.disk_error.clone(),
            resets: self.reset_status(),
            guest_agent: self.devices.agent.as_ref().map(AgentHandle::status),
            panics: (self.pvpanic.as_ref())
                .map_or_else(PanicStatus::default, |device| device.status()),
        }
    }
}
