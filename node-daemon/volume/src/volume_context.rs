//! What the threads of one `bascule-volume` share: the volume, this node's place on it, and what it
//! has seen of the others.
//!
//! ```text
//!   lease thread ──lease──►┐                        ┌──► control threads (volume.sock)
//!   watch thread ──others─►│  State (one mutex,     │
//!   join thread ──joined──►│  one condition)        ├──► peer threads (TCP)
//!   coordinate thread ────►┘                        └──► lease thread publishes the gate page
//! ```
//! No thread does I/O while it holds the mutex.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bascule_types::{BootTime, NodeUid, Owner, SlotId};
use bascule_volume_format::{
    CoordinatorEpoch, HeartbeatRecord, LeaderBlock, Metadata, SlotRow, Superblock, WatchdogKind,
};
use bascule_volume_gate::{GateWriter, boot_time_now};
use bascule_volume_protocol::{LeasePhase, Rules, Watcher};

use crate::block_device::Device;
use crate::peer_rpc::{PeerOperation, PeerRequest, PeerResponse, Tls};
use crate::writer_table::WriterTable;

/// One attached volume, as one process serves it.
#[derive(Debug)]
pub struct VolumeContext {
    /// Who and where this process is.
    pub config: ProcessConfig,
    /// The volume.
    pub superblock: Superblock,
    /// Its device.
    pub device: Device,
    /// The page in which this node's lease is published.
    pub gate: GateWriter,
    /// This node's certificates.
    pub tls: Tls,
    /// Held while the watchdog's owner is told what to watch: what it is told last must be what
    /// holds.
    pub watchdog_call: Mutex<()>,
    /// Held while a disk is zeroed.
    pub zeroing: Mutex<()>,
    state: Mutex<State>,
    changed: Condvar,
}

/// Who and where a process is.
#[derive(Clone, Debug)]
pub struct ProcessConfig {
    /// The node.
    pub node: NodeUid,
    /// The kernel's boot id.
    pub boot: [u8; 16],
    /// The run directory of this volume.
    pub run_dir: PathBuf,
    /// The socket of the node's `bascule-watchdog`.
    pub watchdog_sock: PathBuf,
    /// Where other nodes reach this process.
    pub address: SocketAddr,
}

/// What changes. One thread writes each field, as said there; all read.
#[derive(Debug)]
pub struct State {
    /// The lease thread's.
    pub lease: LeaseView,
    /// The join thread's: the generation that the coordinator has acknowledged, whose rows this
    /// node may write. The gate page is published for this one only.
    pub joined: Option<Owner>,
    /// The join thread's: this node's slot.
    pub slot: Option<SlotRow>,
    /// The join thread's: why this node has not joined yet.
    pub waiting_for: Option<String>,
    /// The watch thread's.
    pub watcher: Watcher,
    /// The watch thread's: the newest record of every slot.
    pub heartbeats: BTreeMap<SlotId, HeartbeatRecord>,
    /// The watch thread's: the leader block with the highest epoch.
    pub leader: Option<LeaderBlock>,
    /// The watch thread's: why the device cannot be read.
    pub read_error: Option<String>,
    /// The lease thread's: why heartbeats cannot be written.
    pub write_error: Option<String>,
    /// Why this process must not be used any more.
    pub failed: Option<String>,
    /// The coordinate and watch threads': the rows as last read.
    pub metadata: Option<(CoordinatorEpoch, Metadata)>,
    /// The coordinate thread's: where requests go while this node coordinates.
    pub coordinator: Option<(CoordinatorEpoch, SyncSender<Job>)>,
    /// Since when the coordinator could not be reached although somebody asks.
    pub unreachable_since: Option<BootTime>,
    /// Why the coordinator could not be reached, as last logged.
    pub peer_error: Option<String>,
    /// The processes that write to the volume.
    pub writers: WriterTable,
    /// What resets this node.
    pub watchdog: WatchdogKind,
    /// The process is about to end.
    pub stopping: bool,
    /// It shall leave the volume before.
    pub leaving: bool,
}

/// The lease as the lease thread last saw it.
#[derive(Clone, Copy, Debug)]
pub struct LeaseView {
    /// The phase of the lease machine.
    pub phase: LeasePhase,
    /// The generation that it speaks for.
    pub owner: Option<Owner>,
    /// When it ends.
    pub expiry: BootTime,
}

/// A request for the local coordinator.
#[derive(Debug)]
pub struct Job {
    /// The request.
    pub request: PeerRequest,
    /// Where the answer goes. Dropped without one: the outcome is unknown.
    pub reply: SyncSender<PeerResponse>,
}

/// What a process knows when it starts.
#[derive(Debug)]
pub struct VolumeContextParts {
    /// Who and where.
    pub config: ProcessConfig,
    /// The volume.
    pub superblock: Superblock,
    /// The device.
    pub device: Device,
    /// The gate page.
    pub gate: GateWriter,
    /// The certificates.
    pub tls: Tls,
    /// Who wrote under an earlier process, and may still.
    pub writers: WriterTable,
    /// The generation whose lease was taken over from an earlier process.
    pub joined: Option<Owner>,
}

impl VolumeContext {
    /// A node that has not read anything yet.
    #[must_use]
    pub fn new(parts: VolumeContextParts) -> Self {
        let state = State {
            lease: LeaseView {
                phase: LeasePhase::Lapsed,
                owner: None,
                expiry: BootTime(0),
            },
            joined: parts.joined,
            slot: None,
            waiting_for: Some("the volume's metadata".to_owned()),
            watcher: Watcher::new(Rules::ENFORCED),
            heartbeats: BTreeMap::new(),
            leader: None,
            read_error: None,
            write_error: None,
            failed: None,
            metadata: None,
            coordinator: None,
            unreachable_since: None,
            peer_error: None,
            writers: parts.writers,
            watchdog: WatchdogKind::None,
            stopping: false,
            leaving: false,
        };
        Self {
            config: parts.config,
            superblock: parts.superblock,
            device: parts.device,
            gate: parts.gate,
            tls: parts.tls,
            watchdog_call: Mutex::new(()),
            zeroing: Mutex::new(()),
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// The shared state.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Alters the shared state and wakes whoever waits for it.
    pub fn update<T>(&self, alter: impl FnOnce(&mut State) -> T) -> T {
        let result = alter(&mut self.state());
        self.changed.notify_all();
        result
    }

    /// Waits until the state has changed or `timeout` has passed.
    pub fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        timeout: Duration,
    ) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, timeout);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Waits until `done` or until `timeout` has passed.
    pub fn wait_until(&self, timeout: Duration, done: impl Fn(&State) -> bool) -> bool {
        let waited = self
            .changed
            .wait_timeout_while(self.state(), timeout, |state| !done(state));
        let state = waited.unwrap_or_else(PoisonError::into_inner).0;
        done(&state)
    }

    /// Closes the gate for good: nothing of this node is written until the volume was re-opened
    /// and re-verified by a new process. The first reason is the one that is shown.
    pub fn fail(&self, reason: &str) {
        tracing::error!(reason, "the volume is failed on this node");
        self.gate.mark_failed();
        let pid = std::process::id();
        let told = format!(
            "{reason}; nothing of this node is written until the device is sound, process {pid} has \
             been ended, and the one that follows it has verified the volume"
        );
        self.update(|state| {
            state.failed.get_or_insert(told);
        });
    }

    /// Whether the process is about to end.
    pub fn is_stopping(&self) -> bool {
        self.state().stopping
    }

    /// Asks the coordinator, wherever it is, again and again until one answers. None if `limit`
    /// passes first: the outcome is then unknown.
    pub fn request_coordinator(
        &self,
        operation: &PeerOperation,
        limit: Duration,
    ) -> Option<PeerResponse> {
        let deadline = boot_time_now().after(limit);
        loop {
            let left = deadline.since(boot_time_now());
            if left.is_zero() || self.is_stopping() {
                return None;
            }
            if let Some(response) = self.request_once(operation, left) {
                self.update(|state| {
                    state.unreachable_since = None;
                    state.peer_error = None;
                });
                return Some(response);
            }
            let mut state = self.state();
            let now = boot_time_now();
            state.unreachable_since.get_or_insert(now);
            drop(self.wait(state, RETRY.min(left)));
        }
    }

    fn request_once(&self, operation: &PeerOperation, left: Duration) -> Option<PeerResponse> {
        let (request, route) = {
            let state = self.state();
            let request = PeerRequest {
                volume: self.superblock.volume,
                node: self.config.node,
                owner: state.lease.owner,
                boot: self.config.boot,
                operation: operation.clone(),
            };
            (request, state.route())
        };
        match route? {
            Route::Local(queue) => self.request_local_coordinator(&queue, request, left),
            Route::Peer(address) => {
                match self.tls.request(address, &request, left.min(self.step())) {
                    Ok(PeerResponse::NotCoordinator | PeerResponse::WrongVolume) => None,
                    Ok(response) => Some(response),
                    Err(error) => {
                        let error = format!("{:#}", anyhow::Error::from(error));
                        let mut state = self.state();
                        if state.peer_error.as_ref() != Some(&error) {
                            tracing::warn!(%address, error, "the coordinator does not answer");
                            state.peer_error = Some(error);
                        }
                        None
                    }
                }
            }
        }
    }

    /// How long one connection may take: a frozen coordinator is replaced after about L.
    fn step(&self) -> Duration {
        self.superblock.timings.lease.clamp(STEP_MIN, STEP_MAX)
    }

    /// Asks the coordinator in this process.
    pub fn request_local_coordinator(
        &self,
        queue: &SyncSender<Job>,
        request: PeerRequest,
        left: Duration,
    ) -> Option<PeerResponse> {
        let (reply, answer) = sync_channel(1);
        queue.try_send(Job { request, reply }).ok()?;
        match answer.recv_timeout(left) {
            Ok(PeerResponse::NotCoordinator) | Err(_) => None,
            Ok(response) => Some(response),
        }
    }
}

enum Route {
    Local(SyncSender<Job>),
    Peer(SocketAddr),
}

impl State {
    fn route(&self) -> Option<Route> {
        if let Some((_, queue)) = &self.coordinator {
            return Some(Route::Local(queue.clone()));
        }
        let leader = self.leader?.coordinator;
        let record = self.heartbeats.get(&leader.slot)?;
        if record.owner != leader || record.detached || Some(leader) == self.lease.owner {
            return None;
        }
        record.address.parse().ok().map(Route::Peer)
    }

    /// Whether this node may write now.
    #[must_use]
    pub fn is_open(&self, now: BootTime) -> bool {
        self.failed.is_none()
            && self.lease.phase == LeasePhase::Held
            && self.joined.is_some()
            && self.joined == self.lease.owner
            && now < self.lease.expiry
    }
}

/// Between two attempts to reach a coordinator that is not there.
const RETRY: Duration = Duration::from_millis(100);
/// A commit takes some writes and reads, on a slow device too.
const STEP_MIN: Duration = Duration::from_secs(1);
const STEP_MAX: Duration = Duration::from_secs(5);
