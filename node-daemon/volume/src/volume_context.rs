//! What the threads of one `bascule-volume` share: the volume, this node's slot on it, and what it
//! has read of the other nodes.
//!
//! ```text
//!   heartbeat ────lease───────►┐                    ┌──► threads of volume.sock
//!   peer-watch ───heartbeats──►│ State (one mutex,  │
//!   registration ─joined──────►│ one condition      ├──► threads of the TCP port
//!   coordinator ──overview────►┘ variable)          └──► heartbeat publishes the gate page
//! ```
//! No thread does I/O while it holds the mutex.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bascule_types::{BootTime, Lba, NodeUid, Owner, SlotId, VmUid};
use bascule_volume_format::{
    CoordinatorEpoch, Features, Fencing, HeartbeatRecord, LeaderBlock, Obsolete, Overview, SlotRow,
    Superblock,
};
use bascule_volume_gate::{Changes, GateError, GateWriter};
use bascule_volume_protocol::{Enlistment, LeasePhase, Rules, Watcher, WriterId};

use crate::block_device::SharedDevice;
use crate::host::Host;
use crate::job_queue::JobQueue;
use crate::peer_rpc::{PeerOperation, PeerRequest, PeerResponse};
use crate::published_watchdog::PublishedWatchdog;
use crate::turn::Turn;
use crate::writer_lock::writer_started;
use crate::writer_table::WriterTable;

/// One attached volume, as one process serves it.
#[derive(Debug)]
pub struct VolumeContext {
    /// The identity and the addresses of this process.
    pub config: ProcessConfig,
    /// As read when the volume was opened.
    pub superblock: Superblock,
    /// The opened device or file that holds the volume.
    pub device: Box<dyn SharedDevice>,
    /// Clock, waiting, network and watchdog of this machine.
    pub host: Arc<dyn Host>,
    /// The page in which this process publishes the lease; every writer reads it.
    pub gate: GateWriter,
    /// Held during a call to `bascule-watchdog`, so that the last call carries the latest state of
    /// the writers.
    pub watchdog_call: Turn,
    /// Held while a disk is zeroed: one at a time.
    pub zeroing: Turn,
    state: Mutex<State>,
    changes: Changes,
}

/// The identity and the addresses of a process.
#[derive(Clone, Debug)]
pub struct ProcessConfig {
    /// The UID of this Kubernetes node.
    pub node: NodeUid,
    /// The boot id of the kernel.
    pub boot: [u8; 16],
    /// The features of the format that this release knows.
    pub features: Features,
    /// All of them; tests break one at a time.
    pub rules: Rules,
    /// The run directory of this volume.
    pub run_dir: PathBuf,
    /// The address at which other nodes reach this process; published in the heartbeat.
    pub address: SocketAddr,
}

/// The mutable state. Each field names the thread that writes it; all threads read it.
#[derive(Debug)]
pub struct State {
    /// Written by the heartbeat thread.
    pub lease: LeaseView,
    /// Written by the registration thread: the slot and generation that the coordinator has
    /// acknowledged. This node may write the VMs that it owns; the gate page is published only for
    /// it.
    pub joined: Option<Owner>,
    /// Written by the registration thread: this node's slot.
    pub slot: Option<SlotRow>,
    /// Written by the registration and heartbeat threads: what this node waits for before it may
    /// write, for status messages.
    pub waiting_for: Option<String>,
    /// Written by the peer-watch thread: since when each heartbeat has not changed.
    pub watcher: Watcher,
    /// Written by the peer-watch thread: the newest heartbeat record of every slot.
    pub heartbeats: BTreeMap<SlotId, HeartbeatRecord>,
    /// Written by the peer-watch thread: the leader block with the highest epoch.
    pub leader: Option<LeaderBlock>,
    /// Written by the peer-watch thread: why the device cannot be read.
    pub read_error: Option<String>,
    /// Written by the heartbeat thread: why heartbeats cannot be written.
    pub write_error: Option<String>,
    /// Damaged blocks that are ignored, and were reported.
    pub damaged: BTreeSet<Lba>,
    /// Written by any thread, once: why this node must not write to the volume until a new process
    /// has verified it.
    pub failed: Option<String>,
    /// Written by the coordinator and peer-watch threads: what was last in force.
    pub overview: Option<(CoordinatorEpoch, Overview)>,
    /// Written by the coordinator thread: the queue of its requests while this node coordinates.
    pub coordinator: Option<(CoordinatorEpoch, JobQueue)>,
    /// Written by requesters: since when no request has reached a coordinator.
    pub unreachable_since: Option<BootTime>,
    /// Written by requesters: the last logged connection error, so that it is logged once.
    pub peer_error: Option<String>,
    /// The processes that may write to the volume.
    pub writers: WriterTable,
    /// Written by the calls to `bascule-watchdog`: whether gates may open, and the kind of watchdog that
    /// the heartbeat publishes.
    pub enlistment: Enlistment,
    /// Written by the heartbeat thread: what other nodes may have read of that kind.
    pub published_watchdog: PublishedWatchdog,
    /// All threads end.
    pub stopping: bool,
    /// The heartbeat thread writes a last, detached record before it ends.
    pub leaving: bool,
}

/// The lease as the heartbeat thread last published it.
#[derive(Clone, Copy, Debug)]
pub struct LeaseView {
    /// The phase of [`bascule_volume_protocol::LeaseHolder`].
    pub phase: LeasePhase,
    /// The slot and generation that the lease is for.
    pub owner: Option<Owner>,
    /// No write of this node may be submitted from this time on.
    pub expiry: BootTime,
}

/// The parts from which a [`VolumeContext`] is built.
#[derive(Debug)]
#[expect(missing_docs, reason = "as the fields of VolumeContext")]
pub struct VolumeContextParts {
    pub config: ProcessConfig,
    pub superblock: Superblock,
    /// The opened device or file that holds the volume.
    pub device: Box<dyn SharedDevice>,
    pub host: Arc<dyn Host>,
    pub gate: GateWriter,
    /// The writers of an earlier process, which may still write.
    pub writers: WriterTable,
    /// The slot and generation whose lease an earlier process left in the gate page.
    pub joined: Option<Owner>,
}

impl VolumeContext {
    /// The context before any thread has started.
    #[must_use]
    pub fn new(parts: VolumeContextParts) -> Self {
        let rules = parts.config.rules;
        // Under LeaseOnly no watchdog resets the node: an expired lease only stalls guests.
        let is_required = parts.superblock.fencing == Fencing::Watchdog;
        let state = State {
            lease: LeaseView {
                phase: LeasePhase::Lapsed,
                owner: None,
                expiry: BootTime(0),
            },
            joined: parts.joined,
            slot: None,
            waiting_for: Some("the volume's metadata".to_owned()),
            watcher: Watcher::new(rules),
            heartbeats: BTreeMap::new(),
            leader: None,
            read_error: None,
            write_error: None,
            damaged: BTreeSet::new(),
            failed: None,
            overview: None,
            coordinator: None,
            unreachable_since: None,
            peer_error: None,
            writers: parts.writers,
            enlistment: Enlistment::new(rules, is_required),
            published_watchdog: PublishedWatchdog::UNKNOWN,
            stopping: false,
            leaving: false,
        };
        Self {
            config: parts.config,
            superblock: parts.superblock,
            device: parts.device,
            gate: parts.gate,
            watchdog_call: Turn::new(Arc::clone(&parts.host)),
            zeroing: Turn::new(Arc::clone(&parts.host)),
            host: parts.host,
            state: Mutex::new(state),
            changes: Changes::default(),
        }
    }

    /// The shared state, locked.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the shared state and wakes the threads that wait for a change.
    pub fn update<T>(&self, alter: impl FnOnce(&mut State) -> T) -> T {
        let result = alter(&mut self.state());
        self.announce();
        result
    }

    /// Stores the lease of this node and publishes it in the gate page, if this node may write under it.
    /// Closes the gate if the lease is over for good.
    ///
    /// # Errors
    /// [`GateError`]: the page shows another slot or a later generation.
    pub fn set_lease(&self, lease: LeaseView) -> Result<(), GateError> {
        self.update(|state| {
            state.lease = lease;
            if let LeasePhase::Stopped(_) = lease.phase {
                self.gate.close();
            }
            self.publish_lease(state)
        })
    }

    /// Changes what is known of the enlistment, takes into account what other nodes may have read, and
    /// opens the gates that may open then.
    pub fn change_enlistment(&self, change: impl FnOnce(Enlistment) -> Enlistment) {
        let published = self.update(|state| {
            let before = state.enlistment.kind();
            let may_name_one = state.published_watchdog.may_name_one();
            state.enlistment = change(state.enlistment.clone()).published(may_name_one);
            let kind = state.enlistment.kind();
            if kind != before {
                tracing::info!(?kind, "the node's watchdog kind changed");
            }
            self.publish_lease(state)
        });
        if let Err(error) = published {
            self.fail(&format!("cannot publish the lease: {error}"));
        }
    }

    /// The only publication of a lease. The caller holds the mutex: a lease is not published between the
    /// decision to withdraw the volume from the watchdog and its consequences.
    fn publish_lease(&self, state: &State) -> Result<(), GateError> {
        match state.lease.owner {
            Some(owner) if state.is_joined() && state.may_open_gates() => {
                self.gate.publish(owner, state.lease.expiry)
            }
            _ => Ok(()),
        }
    }

    /// Wakes the threads that wait for a change.
    pub fn announce(&self) {
        self.changes.add();
        self.host.wake(&self.changes);
    }

    /// The present time of this host's `CLOCK_BOOTTIME`.
    pub fn now(&self) -> BootTime {
        self.host.now()
    }

    /// Waits until the state has changed or `timeout` has passed.
    pub fn wait<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        timeout: Duration,
    ) -> MutexGuard<'a, State> {
        // Counted while the state is locked: a change after that is not missed.
        let seen = self.changes.count();
        drop(state);
        self.host.wait_for_change(&self.changes, seen, timeout);
        self.state()
    }

    /// Waits until `done` or until `timeout` has passed.
    pub fn wait_until(&self, timeout: Duration, done: impl Fn(&State) -> bool) -> bool {
        let deadline = self.now().after(timeout);
        let mut state = self.state();
        loop {
            if done(&state) {
                return true;
            }
            let left = deadline.since(self.now());
            if left.is_zero() {
                return false;
            }
            state = self.wait(state, left);
        }
    }

    /// Closes the gate permanently: this node writes nothing until a new process has re-opened and
    /// verified the volume. The first `reason` is the one that the status shows.
    pub fn fail(&self, reason: &str) {
        tracing::error!(
            reason,
            "the volume failed on this node: its gate stays closed"
        );
        self.gate.mark_failed();
        let pid = std::process::id();
        let shown = format!(
            "{reason}; this node writes nothing to the volume until the device works again, process \
             {pid} has been ended, and the next process has verified the volume"
        );
        self.update(|state| {
            state.failed.get_or_insert(shown);
        });
    }

    /// The living process `pid` of this node as a writer of `vm`.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn writer(&self, vm: VmUid, pid: u32) -> io::Result<WriterId> {
        writer_started(vm, pid, self.host.start_time(pid))
    }

    /// Reports damaged blocks that are ignored, each once.
    pub fn report_damage(&self, blocks: &[Obsolete]) {
        for block in blocks {
            if self.state().damaged.insert(block.lba) {
                tracing::warn!(
                    "{block}; bascule-volume repair blanks it on a volume that no node has attached"
                );
            }
        }
    }

    /// Whether all threads shall end.
    pub fn is_stopping(&self) -> bool {
        self.state().stopping
    }

    /// Sends a request to the coordinator, in this process or on another node, and retries until one
    /// answers. `None` if `timeout` passes first: the outcome is then unknown.
    pub fn request_coordinator(
        &self,
        operation: &PeerOperation,
        timeout: Duration,
    ) -> Option<PeerResponse> {
        let deadline = self.now().after(timeout);
        loop {
            let left = deadline.since(self.now());
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
            let now = self.now();
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
                let timeout = left.min(self.connection_timeout());
                match self.host.request_peer(address, &request, timeout) {
                    Ok(PeerResponse::NotCoordinator | PeerResponse::WrongVolume) => None,
                    Ok(response) => Some(response),
                    Err(error) => {
                        let error = format!("{:#}", anyhow::Error::from(error));
                        let mut state = self.state();
                        if state.peer_error.as_ref() != Some(&error) {
                            tracing::warn!(%address, error, "the coordinator does not respond");
                            state.peer_error = Some(error);
                        }
                        None
                    }
                }
            }
        }
    }

    /// The timeout of one connection: the lease time, within bounds, because a frozen coordinator is
    /// replaced after about that time.
    fn connection_timeout(&self) -> Duration {
        self.superblock
            .timings
            .lease
            .clamp(CONNECTION_TIMEOUT_MIN, CONNECTION_TIMEOUT_MAX)
    }

    /// Sends a request to the coordinator thread of this process.
    pub fn request_local_coordinator(
        &self,
        queue: &JobQueue,
        request: PeerRequest,
        left: Duration,
    ) -> Option<PeerResponse> {
        let reply = queue.push(request)?;
        self.announce();
        self.wait_until(left, |_| reply.is_over());
        reply
            .take()
            .filter(|response| *response != PeerResponse::NotCoordinator)
    }

    /// Answers the request of another node.
    pub fn answer_peer(&self, request: PeerRequest, timeout: Duration) -> PeerResponse {
        if request.volume != self.superblock.volume {
            return PeerResponse::WrongVolume;
        }
        let queue = self
            .state()
            .coordinator
            .as_ref()
            .map(|(_, queue)| queue.clone());
        queue
            .and_then(|queue| self.request_local_coordinator(&queue, request, timeout))
            .unwrap_or(PeerResponse::NotCoordinator)
    }
}

enum Route {
    Local(JobQueue),
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

    /// Whether this node holds a lease in a generation that the coordinator has acknowledged.
    fn is_joined(&self) -> bool {
        self.lease.phase == LeasePhase::Held
            && self.joined.is_some()
            && self.joined == self.lease.owner
    }

    /// The end of the lease under which gates are open at `now`, or may open; none without one.
    #[must_use]
    pub fn lease_until(&self, now: BootTime) -> Option<BootTime> {
        (self.is_joined() && now < self.lease.expiry).then_some(self.lease.expiry)
    }

    /// Whether the watchdog watches the volume as far as its writers need it.
    #[must_use]
    pub fn may_open_gates(&self) -> bool {
        self.enlistment.may_open(self.writers.must_be_watched())
    }

    /// Whether this node may write at `now`.
    #[must_use]
    pub fn is_open(&self, now: BootTime) -> bool {
        self.failed.is_none() && self.lease_until(now).is_some() && self.may_open_gates()
    }
}

/// Between two attempts to reach a coordinator.
const RETRY: Duration = Duration::from_millis(100);
/// A commit takes several reads and writes; on a slow device, hundreds of milliseconds.
const CONNECTION_TIMEOUT_MIN: Duration = Duration::from_secs(1);
const CONNECTION_TIMEOUT_MAX: Duration = Duration::from_secs(5);
