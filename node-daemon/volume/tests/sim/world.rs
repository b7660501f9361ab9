//! Three machines: each with a clock, processes, a watchdog and a path to the shared disk; and the network
//! between them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bascule_ipc::IpcError;
use bascule_ipc::volume::Request as VolumeRequest;
use bascule_ipc::watchdog::{Request, Response};
use bascule_types::{BootTime, NodeUid};
use bascule_volume::host::Host;
use bascule_volume::local_api;
use bascule_volume::peer_rpc::{PeerError, PeerRequest, PeerResponse};
use bascule_volume::process::{Opened, assemble};
use bascule_volume::volume_context::{ProcessConfig, VolumeContext};
use bascule_volume::watchdog_client;
use bascule_volume::write_ledger::{LedgerParts, WriteLedger};
use bascule_volume_format::{Features, SlotPart, read_copies};
use bascule_volume_gate::{Changes, Clock, GateReader, GateView, GateWriter};

use crate::Setup;
use crate::disk::{Attached, Disk, Initiator};
use crate::faults::Faults;
use crate::guest::Oracle;
use crate::profile::{Moment, Profile};
use crate::scheduler::{Group, Scheduler, nanos};
use crate::watchdog::Watchdog;

pub(crate) const NODES: u8 = 3;

pub(crate) struct World {
    pub(crate) scheduler: Arc<Scheduler>,
    pub(crate) disk: Arc<Disk>,
    pub(crate) setup: Setup,
    directory: tempfile::TempDir,
    pub(crate) faults: Faults,
    nodes: Mutex<Vec<Node>>,
}

pub(crate) struct Node {
    pub(crate) is_up: bool,
    /// Nobody switches it on again.
    pub(crate) stays_off: bool,
    boot: u64,
    booted_at: u64,
    /// Parts in a million by which its clock is fast.
    drift: i64,
    next_pid: u32,
    processes: BTreeSet<u32>,
    /// The features that its release of `bascule-volume` knows.
    pub(crate) features: Features,
    pub(crate) volume: Option<Arc<VolumeContext>>,
    pub(crate) volume_pid: Option<u32>,
    pub(crate) cut_off_until: u64,
    /// Until when `bascule-watchdog` does not answer.
    pub(crate) deaf_until: u64,
    pub(crate) watchdog: Watchdog,
    /// Its guests that have a write in flight, or one that failed, or are about to open their VM.
    pub(crate) busy: BTreeSet<u32>,
    /// Since when nothing of it needs a reset.
    pub(crate) idle_since: Option<u64>,
    pub(crate) resets: u32,
}

impl World {
    pub(crate) fn new(
        scheduler: &Arc<Scheduler>,
        disk: Arc<Disk>,
        setup: Setup,
        profile: Profile,
    ) -> Arc<Self> {
        let node = |_| Node {
            is_up: false,
            stays_off: false,
            boot: 0,
            booted_at: 0,
            drift: i64::try_from(scheduler.below(1000)).unwrap_or(0) - 500,
            next_pid: 100,
            processes: BTreeSet::new(),
            features: Features::KNOWN,
            volume: None,
            volume_pid: None,
            cut_off_until: 0,
            deaf_until: 0,
            watchdog: Watchdog::default(),
            busy: BTreeSet::new(),
            idle_since: None,
            resets: 0,
        };
        Arc::new(Self {
            scheduler: Arc::clone(scheduler),
            disk,
            setup,
            faults: Faults::new(profile),
            directory: tempfile::tempdir().expect("a directory"),
            nodes: Mutex::new((0..NODES).map(node).collect()),
        })
    }

    pub(crate) fn nodes(&self) -> MutexGuard<'_, Vec<Node>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn oracle(&self) -> MutexGuard<'_, Oracle> {
        let oracle = self.disk.oracle.lock();
        oracle.unwrap_or_else(PoisonError::into_inner)
    }

    fn features(&self, node: u8) -> Features {
        self.nodes()[usize::from(node)].features
    }

    pub(crate) fn initiator(&self, node: u8) -> Initiator {
        (node, self.nodes()[usize::from(node)].boot)
    }

    /// `CLOCK_BOOTTIME` of a node.
    pub(crate) fn node_time(&self, node: u8) -> BootTime {
        let now = self.scheduler.now();
        let node = &self.nodes()[usize::from(node)];
        let up = i128::from(now - node.booted_at);
        let shown = up + up * i128::from(node.drift) / 1_000_000;
        // A second more, so that no time is 0.
        BootTime(u64::try_from(shown).unwrap_or(0) + 1_000_000_000)
    }

    /// What the gate page of a node shows.
    pub(crate) fn gate_view(&self, node: u8) -> Option<GateView> {
        let page = GateReader::open(self.run_dir(node).join("gate"));
        Some(page.ok()?.view())
    }

    fn run_dir(&self, node: u8) -> PathBuf {
        self.directory.path().join(format!("n{node}"))
    }

    pub(crate) fn start_process(&self, node: u8) -> u32 {
        let mut nodes = self.nodes();
        let node = &mut nodes[usize::from(node)];
        let pid = node.next_pid;
        node.next_pid += 1;
        node.processes.insert(pid);
        pid
    }

    pub(crate) fn lives(&self, node: u8, pid: u32) -> bool {
        self.nodes()[usize::from(node)].processes.contains(&pid)
    }

    /// kill -9: requests go on in the kernel.
    pub(crate) fn kill_process(&self, node: u8, pid: u32) {
        let group = Group { node, process: pid };
        {
            let mut nodes = self.nodes();
            let node = &mut nodes[usize::from(node)];
            if node.volume_pid == Some(pid) {
                node.volume = None;
                node.volume_pid = None;
            }
        }
        self.disk.process_ended(self.initiator(node), pid);
        self.scheduler.kill(false, |other| other == group);
        self.nodes()[usize::from(node)].processes.remove(&pid);
    }

    /// Cuts a node's power, or its watchdog fires.
    pub(crate) fn reset(&self, node: u8) {
        {
            let mut nodes = self.nodes();
            let down = &mut nodes[usize::from(node)];
            down.is_up = false;
            down.volume = None;
            down.volume_pid = None;
            down.processes.clear();
            down.watchdog = Watchdog::default();
            down.busy.clear();
            down.idle_since = None;
            down.deaf_until = 0;
        }
        self.disk.reset(node);
        self.scheduler.let_go(node);
        self.scheduler.kill(true, |group| group.node == node);
        drop(std::fs::remove_dir_all(self.run_dir(node)));
    }

    pub(crate) fn boot(self: &Arc<Self>, node: u8) {
        std::fs::create_dir_all(self.run_dir(node)).expect("the run directory");
        {
            let mut nodes = self.nodes();
            let up = &mut nodes[usize::from(node)];
            up.is_up = true;
            up.boot += 1;
            up.booted_at = self.scheduler.now();
        }
        let keep_volume_running: fn(&Arc<Self>, u8) = Self::keep_volume_running;
        for run in [keep_volume_running, Self::keep_watchdog_running] {
            let world = Arc::clone(self);
            (self.scheduler).spawn(daemon_of(node), "daemon", move || run(&world, node));
        }
    }

    /// The node's daemon: starts the volume's process again and again.
    fn keep_volume_running(self: &Arc<Self>, node: u8) {
        loop {
            let pid = self.nodes()[usize::from(node)].volume_pid;
            match pid {
                None => {
                    let pid = self.start_process(node);
                    self.nodes()[usize::from(node)].volume_pid = Some(pid);
                    let world = Arc::clone(self);
                    let group = Group { node, process: pid };
                    self.scheduler
                        .spawn(group, "volume", move || world.serve(node, pid));
                }
                Some(pid) => {
                    let volume = self.nodes()[usize::from(node)].volume.clone();
                    let failed = volume.is_some_and(|volume| volume.state().failed.is_some());
                    if failed {
                        self.kill_process(node, pid);
                    }
                }
            }
            self.scheduler.sleep(Duration::from_millis(700));
        }
    }

    /// The volume's process, as `serve_command` builds it.
    fn serve(self: &Arc<Self>, node: u8, pid: u32) {
        let opened = loop {
            match self.open(node, pid) {
                Ok(opened) => break opened,
                Err(_) => self.scheduler.sleep(Duration::from_millis(500)),
            }
        };
        let config = ProcessConfig {
            node: node_uid(node),
            boot: boot_bytes(self.initiator(node)),
            features: self.features(node),
            rules: self.setup.rules,
            run_dir: self.run_dir(node),
            address: address(node),
        };
        let host = Arc::new(SimulatedHost {
            world: Arc::clone(self),
            node,
        });
        let Ok(assembled) = assemble(config, host, opened) else {
            // The daemon starts another one later.
            return self.end_process(node, pid);
        };
        let context = Arc::clone(&assembled.context);
        watchdog_client::refresh(&context);
        let group = Group { node, process: pid };
        for (name, run) in assembled.threads() {
            let context = Arc::clone(&context);
            self.scheduler.spawn(group, name, move || run(&context));
        }
        self.nodes()[usize::from(node)].volume = Some(context);
    }

    fn open(self: &Arc<Self>, node: u8, pid: u32) -> anyhow::Result<Opened> {
        let world = Arc::clone(self);
        let elects = Arc::clone(self);
        let about_to_write = move |lba| {
            let part = elects.disk.superblock().slot_part(lba);
            if let Some((_, SlotPart::Paxos(_) | SlotPart::Leader)) = part {
                elects.reached(Moment::Electing, node);
            }
        };
        let device = Attached {
            disk: Arc::clone(&self.disk),
            initiator: self.initiator(node),
            pid,
            lives: Arc::new(move |pid| world.lives(node, pid)),
            about_to_write: Arc::new(about_to_write),
            has_written_area: false,
        };
        let superblock = read_copies(&mut device.clone(), self.features(node))?.current;
        superblock.check_writable(self.features(node))?;
        let run_dir = self.run_dir(node);
        let (gate, found) = GateWriter::open(run_dir.join("gate"), superblock.volume)?;
        let ledger = WriteLedger::open(LedgerParts {
            rules: self.setup.rules,
            directory: &run_dir,
            volume: superblock.volume,
            boot: boot_bytes(self.initiator(node)),
            now: self.node_time(node),
            process: (pid, u64::from(pid)),
            device: Box::new(device.clone()),
        })?;
        Ok(Opened {
            device: Box::new(device),
            superblock,
            gate,
            found,
            ledger,
        })
    }

    /// A request on `volume.sock` of a node. None when its process is gone or does not answer.
    pub(crate) fn call_volume(
        self: &Arc<Self>,
        node: u8,
        pid: u32,
        request: &VolumeRequest,
    ) -> Option<local_api::Reply> {
        let request = request.clone();
        self.ask(
            node,
            move |context| local_api::answer(context, &request, Some(pid)),
            PATIENCE,
        )
    }

    /// Runs `answer` on a thread of the node's volume process, which may be killed meanwhile.
    pub(crate) fn ask<T: Send + 'static>(
        self: &Arc<Self>,
        node: u8,
        answer: impl FnOnce(&VolumeContext) -> T + Send + 'static,
        patience: Duration,
    ) -> Option<T> {
        let (context, pid) = {
            let nodes = self.nodes();
            let node = &nodes[usize::from(node)];
            (node.volume.clone()?, node.volume_pid?)
        };
        let group = Group { node, process: pid };
        self.run_in(group, "request", move || answer(&context), patience)
    }

    /// Runs `answer` on a thread of its own, which may be killed meanwhile.
    pub(crate) fn run_in<T: Send + 'static>(
        self: &Arc<Self>,
        group: Group,
        name: &str,
        answer: impl FnOnce() -> T + Send + 'static,
        patience: Duration,
    ) -> Option<T> {
        let result: Arc<Mutex<Option<T>>> = Arc::default();
        let key = Arc::as_ptr(&result).cast::<()>() as usize;
        let (filled, scheduler) = (Arc::clone(&result), Arc::clone(&self.scheduler));
        self.scheduler.spawn(group, name, move || {
            let answered = answer();
            *filled.lock().unwrap_or_else(PoisonError::into_inner) = Some(answered);
            scheduler.wake(key);
        });
        let deadline = self.scheduler.now() + nanos(patience);
        loop {
            let found = result.lock().unwrap_or_else(PoisonError::into_inner).take();
            // The other reference is the thread's.
            let over = Arc::strong_count(&result) == 1 || self.scheduler.now() >= deadline;
            if found.is_some() || over {
                return found;
            }
            let look = self.scheduler.now() + 50_000_000;
            self.scheduler.block(Some(key), look.min(deadline), false);
        }
    }

    /// A volume's process ends by itself.
    fn end_process(&self, node: u8, pid: u32) {
        self.disk.process_ended(self.initiator(node), pid);
        let mut nodes = self.nodes();
        let node = &mut nodes[usize::from(node)];
        node.forget(pid);
        if node.volume_pid == Some(pid) {
            node.volume_pid = None;
        }
    }

    fn node_at(&self, wanted: SocketAddr) -> Option<u8> {
        (0..NODES).find(|node| address(*node) == wanted)
    }

    /// A guest's writes may be in flight, or are not any more.
    pub(crate) fn set_busy(&self, node: u8, pid: u32, is_busy: bool) {
        let busy = &mut self.nodes()[usize::from(node)].busy;
        if is_busy {
            busy.insert(pid);
        } else {
            busy.remove(&pid);
        }
    }

    pub(crate) fn is_deaf(&self, node: u8) -> bool {
        let now = self.scheduler.now();
        self.nodes()[usize::from(node)].deaf_until > now
    }

    fn is_cut_off(&self, node: u8) -> bool {
        let now = self.scheduler.now();
        self.nodes()[usize::from(node)].cut_off_until > now
    }
}

/// What a process has of its machine.
#[derive(Clone)]
pub(crate) struct SimulatedHost {
    pub(crate) world: Arc<World>,
    pub(crate) node: u8,
}

impl std::fmt::Debug for SimulatedHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SimulatedHost({})", self.node)
    }
}

impl Clock for SimulatedHost {
    fn now(&self) -> BootTime {
        self.world.node_time(self.node)
    }

    fn wait_for_change(&self, changes: &Changes, seen: u64, timeout: Duration) {
        let scheduler = &self.world.scheduler;
        let deadline = scheduler.now().saturating_add(nanos(timeout));
        let key = std::ptr::from_ref(changes) as usize;
        while changes.count() == seen && scheduler.now() < deadline {
            scheduler.block(Some(key), deadline, false);
        }
    }

    fn wake(&self, changes: &Changes) {
        self.world
            .scheduler
            .wake(std::ptr::from_ref(changes) as usize);
    }
}

impl Host for SimulatedHost {
    fn random_delay(&self, most: Duration) -> Duration {
        Duration::from_nanos(self.world.scheduler.below(nanos(most)))
    }

    fn start_time(&self, pid: u32) -> Option<u64> {
        let lives = self.world.lives(self.node, pid) || pid == std::process::id();
        lives.then_some(u64::from(pid))
    }

    fn request_peer(
        &self,
        address: SocketAddr,
        request: &PeerRequest,
        timeout: Duration,
    ) -> Result<PeerResponse, PeerError> {
        let world = &self.world;
        let lost = || PeerError::Io(io::ErrorKind::TimedOut.into());
        let delay = || Duration::from_micros(100 + world.scheduler.below(3000));
        world.scheduler.sleep(delay());
        let Some(to) = world.node_at(address) else {
            return Err(lost());
        };
        if world.is_cut_off(self.node) || world.is_cut_off(to) {
            world.scheduler.sleep(timeout);
            return Err(lost());
        }
        let request = request.clone();
        world.duplicate(to, &request);
        let answered = world.ask(
            to,
            move |context| context.answer_peer(request, PEER_STEP),
            timeout,
        );
        world.scheduler.sleep(delay());
        if world.is_cut_off(self.node) || world.is_cut_off(to) {
            return Err(lost());
        }
        answered.ok_or_else(lost)
    }

    fn call_watchdog(&self, request: &Request) -> Result<Response, IpcError> {
        self.world.call_watchdog(self.node, request)
    }

    fn keep_awake(&self, _: bool) {}
}

pub(crate) fn node_uid(node: u8) -> NodeUid {
    NodeUid::from_bytes([node + 1; 16])
}

/// The node's daemon.
pub(crate) fn daemon_of(node: u8) -> Group {
    Group { node, process: 1 }
}

fn address(node: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, node + 1], 7421))
}

fn boot_bytes((node, boot): Initiator) -> [u8; 16] {
    let mut bytes = [node + 1; 16];
    bytes[8..].copy_from_slice(&boot.to_le_bytes());
    bytes
}

/// Longer than the volume's process waits for a coordinator.
const PATIENCE: Duration = Duration::from_secs(20);
/// As in `listeners`.
pub(crate) const PEER_STEP: Duration = Duration::from_secs(5);

/// Guests that run: which process on which node, by VM.
pub(crate) type Guests = BTreeMap<u8, (u8, u32)>;

impl Node {
    /// Whether its watchdog watches the volume.
    pub(crate) fn is_watched(&self) -> bool {
        self.watchdog.watches()
    }

    /// A process has ended by itself.
    pub(crate) fn forget(&mut self, pid: u32) {
        self.processes.remove(&pid);
    }
}

impl World {
    /// The processes of a node that are neither its daemon nor its volume's.
    pub(crate) fn guests_of(&self, node: u8) -> Vec<u32> {
        let nodes = self.nodes();
        let node = &nodes[usize::from(node)];
        let processes = node.processes.iter().copied();
        processes
            .filter(|pid| Some(*pid) != node.volume_pid)
            .collect()
    }

    /// For messages: what each node says.
    pub(crate) fn describe(&self) -> String {
        let nodes = self.nodes();
        let describe = |node: &Node| match &node.volume {
            None => "no process".to_owned(),
            Some(volume) => {
                let state = volume.state();
                format!(
                    "{:?} joined {:?} failed {:?} waits for {:?} coordinates {}",
                    state.lease,
                    state.joined,
                    state.failed,
                    state.waiting_for,
                    state.coordinator.is_some()
                )
            }
        };
        nodes.iter().map(describe).collect::<Vec<_>>().join("\n")
    }
}
