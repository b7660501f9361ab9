//! A cluster of three nodes, one volume and one virtual machine, as values.

mod nodes;
mod operators;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::Duration;

use crate::{
    Access, Fact, FailoverView, Migration, MigrationMode, MigrationPhase, Moment, NodeView,
    Observed, Phase, PlannerMemory, Pod, PodPhase, Process, Purpose, RowView, RunPolicy, Stream,
    VmReport,
};
use bascule_ipc::vm::{self, MigrationStatus, VmState, VmStatus};
use bascule_ipc::volume::{PathState, WatchdogKind};
use bascule_types::{
    AttemptId, Bytes, Epoch, Generation, NodeUid, Owner, Ownership, SlotId, VmUid,
};

/// One step is this long.
const STEP_MS: u64 = 1000;
/// After this many steps without a heartbeat the other nodes report the node as one that holds no lease;
/// its lease has certainly ended some steps later, then the watchdog fires, and after that a proof is
/// there.
const SUSPECTED: u32 = 2;
const HEARTBEAT_LOST: u32 = 3;
const WATCHDOG: u32 = 5;
const SAFE: u32 = 7;

#[derive(Clone)]
struct Node {
    uid: NodeUid,
    owner: Owner,
    powered: bool,
    network: bool,
    storage: bool,
    cordoned: bool,
    steps_without_heartbeat: u32,
    processes: Vec<Guest>,
}

#[derive(Clone)]
struct Guest {
    pid: u32,
    alive: bool,
    state: VmState,
    epoch: Epoch,
    owner: Owner,
    incoming: Option<AttemptId>,
    moving: Option<Move>,
    power_button: bool,
}

#[derive(Clone)]
struct Move {
    attempt: AttemptId,
    phase: vm::MigrationPhase,
    to: Owner,
    quick: bool,
}

#[derive(Clone, Default)]
struct Operator {
    memory: PlannerMemory,
    view: Option<Observed>,
    dead_for: u32,
}

pub(super) struct World {
    rng: u64,
    now: Moment,
    nodes: BTreeMap<String, Node>,
    row: Option<RowView>,
    pods: Vec<Pod>,
    bindings: BTreeMap<String, (Option<String>, Vec<String>)>,
    migrations: Vec<Migration>,
    failovers: Vec<FailoverView>,
    takeovers: Vec<Ownership>,
    /// The epochs in which the guest was booted.
    booted: BTreeSet<Epoch>,
    operators: [Operator; 2],
    status: Option<VmReport>,
    run: RunPolicy,
    api_away_for: u32,
    next_id: u32,
    log: Vec<String>,
    pub(super) operators_away: bool,
    pub(super) migrations_fail: bool,
    finalizer: bool,
    last_cause: Moment,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let node = |slot: u16| Node {
            uid: NodeUid::from_bytes([u8::try_from(slot).unwrap() + 1; 16]),
            owner: Owner {
                slot: SlotId(slot),
                generation: Generation(1),
            },
            powered: true,
            network: true,
            storage: true,
            cordoned: false,
            steps_without_heartbeat: 0,
            processes: vec![],
        };
        Self {
            rng: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            now: Moment(1_000_000_000),
            nodes: (0..3)
                .map(|slot| (format!("node-{slot}"), node(slot)))
                .collect(),
            row: None,
            pods: vec![],
            bindings: BTreeMap::new(),
            migrations: vec![],
            failovers: vec![],
            takeovers: vec![],
            booted: BTreeSet::new(),
            operators: [Operator::default(), Operator::default()],
            status: None,
            run: RunPolicy::Always,
            api_away_for: 0,
            next_id: 1,
            log: vec![],
            operators_away: false,
            migrations_fail: false,
            finalizer: false,
            last_cause: Moment(0),
        }
    }

    pub(super) fn step(&mut self, faults: bool) {
        self.now = self.now.after(Duration::from_millis(STEP_MS));
        if faults {
            self.fault();
        }
        let drained = self.pods.iter().any(|pod| pod.leaving_since.is_some());
        if drained || self.run == RunPolicy::Stopped {
            self.last_cause = self.now;
        }
        self.nodes_step();
        self.schedule();
        self.operators_step();
        self.assert_one_guest();
    }

    /// The world is whole again; what is left to do is the operators'.
    pub(super) fn heal(&mut self) {
        for node in self.nodes.values_mut() {
            if !node.powered {
                power_on(node);
            }
            node.network = true;
            node.storage = true;
            node.cordoned = false;
        }
        self.api_away_for = 0;
        self.run = RunPolicy::Always;
        for migration in &mut self.migrations {
            migration.cancel |= false;
        }
        self.note("healed".to_owned());
    }

    pub(super) fn running(&self) -> Vec<(String, u32)> {
        self.nodes
            .iter()
            .filter(|(_, node)| node.powered)
            .flat_map(|(name, node)| node.processes.iter().map(move |p| (name, p)))
            .filter(|(_, p)| p.alive && p.state == VmState::Running)
            .map(|(name, p)| (name.clone(), p.pid))
            .collect()
    }

    pub(super) fn open_migrations(&self) -> usize {
        self.migrations
            .iter()
            .filter(|m| !m.phase.is_final())
            .count()
    }

    pub(super) fn ask_for_migration(&mut self) {
        let n = self.id();
        let quick = self.chance(3);
        self.migrations.push(Migration {
            name: format!("user-{n}"),
            attempt: AttemptId::from_bytes(u128::from(n).to_be_bytes()),
            created: self.now,
            mode: if quick {
                MigrationMode::Quick
            } else {
                MigrationMode::Live
            },
            target: None,
            downtime: None,
            timeout: None,
            bandwidth: None,
            cancel: false,
            drain: false,
            phase: MigrationPhase::Pending,
            started: None,
            source: None,
            source_epoch: None,
            reason: None,
        });
    }

    /// Whether the guest runs, and pods, migrations and records say so.
    pub(super) fn settled(&self) -> Result<(), String> {
        let running = self.running();
        let [(node, _)] = &running[..] else {
            return Err(format!("running: {running:?}"));
        };
        let [pod] = &self.pods[..] else {
            return Err(format!("pods: {:?}", self.pods));
        };
        if pod.node.as_ref() != Some(node) || pod.deleting || pod.purpose != Purpose::Current {
            return Err(format!("guest on {node}, pod {pod:?}"));
        }
        let said = self.status.as_ref();
        if said.is_none_or(|s| s.phase != Phase::Running || s.node.as_ref() != Some(node)) {
            return Err(format!("guest on {node}, status {said:?}"));
        }
        if self.open_migrations() > 0 {
            return Err(format!("migrations: {:?}", self.migrations));
        }
        if self.failovers.iter().any(|f| !f.closed) {
            return Err(format!("failovers: {}", self.failovers.len()));
        }
        let recorded = |&Ownership { owner, epoch }: &Ownership| {
            let mut records = self.failovers.iter();
            records.any(|f| f.owner == owner && f.epoch == epoch && f.taken_over)
        };
        if !self.takeovers.iter().all(recorded) {
            return Err(format!("{:?}: {:?}", self.takeovers, self.failovers));
        }
        let idle = |p: &Guest| p.state == VmState::Running;
        if !self.nodes.values().flat_map(|n| &n.processes).all(idle) {
            return Err("processes are left over".to_owned());
        }
        Ok(())
    }

    pub(super) fn trace(&self) -> String {
        let mut text = String::new();
        if let Some(status) = &self.status {
            writeln!(text, "{:?} {:?}", status.phase, status.ready).unwrap();
        }
        writeln!(text, "row {:?}", self.row).unwrap();
        for (name, node) in &self.nodes {
            writeln!(text, "{name}: {:?} powered {}", node.owner, node.powered).unwrap();
        }
        writeln!(text, "pods {:?}", self.pods).unwrap();
        for line in self.log.iter().rev().take(25).rev() {
            writeln!(text, "{line}").unwrap();
        }
        text
    }

    fn assert_one_guest(&self) {
        let running = self.running();
        assert!(running.len() <= 1, "I2: {running:?}\n{}", self.trace());
    }

    // ---- chance -------------------------------------------------------------------------------

    fn random(&mut self, below: u64) -> u64 {
        // xorshift64*: a seed is a schedule.
        self.rng ^= self.rng >> 12;
        self.rng ^= self.rng << 25;
        self.rng ^= self.rng >> 27;
        (self.rng.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % below
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.random(one_in) == 0
    }

    fn any_node(&mut self) -> String {
        let n = usize::try_from(self.random(3)).unwrap();
        self.nodes.keys().nth(n).unwrap().clone()
    }

    fn id(&mut self) -> u32 {
        self.next_id += 1;
        self.next_id
    }

    fn note(&mut self, what: impl std::fmt::Display) {
        self.log.push(format!("{} {what}", self.now.0 / STEP_MS));
    }

    /// What happens to pods, operators, migrations and intent.
    fn cluster_fault(&mut self, what: u64) -> Option<&'static str> {
        let mut said = None;
        match what {
            14 if !self.pods.is_empty() => {
                self.pods.remove(0);
                said = Some("pod vanished");
            }
            15 => {
                let now = self.now;
                if let Some(pod) = self.pods.iter_mut().find(|p| p.node.is_some()) {
                    pod.phase = PodPhase::Evicted;
                    pod.leaving_since = Some(now);
                    said = Some("pod evicted");
                }
            }
            16 => self.api_away_for = 10,
            17 => self.operators[0].dead_for = 8,
            18 => self.operators[1].dead_for = 8,
            19 | 20 => self.ask_for_migration(),
            21 => {
                if let Some(migration) = self.migrations.last_mut() {
                    migration.cancel = true;
                    said = Some("cancel");
                }
            }
            22 => (self.run, said) = (RunPolicy::Stopped, Some("run policy Stopped")),
            23 | 24 => (self.run, said) = (RunPolicy::Always, Some("run policy Always")),
            25 => {
                if let Some(pod) = self.pods.first_mut() {
                    pod.phase = PodPhase::Failed;
                    said = Some("pod failed");
                }
            }
            _ => {}
        }
        said
    }

    /// Most freezes are shorter than a proof takes, some shorter than a lease.
    fn thaw(&mut self) {
        let frozen = |node: &&mut Node| node.powered && !node.network && !node.storage;
        for node in self.nodes.values_mut().filter(frozen) {
            if node.steps_without_heartbeat >= SUSPECTED {
                (node.network, node.storage) = (true, true);
            }
        }
    }

    fn fault(&mut self) {
        if self.chance(2) {
            self.thaw();
        }
        let name = self.any_node();
        let what = self.random(40);
        let mut said = None;
        {
            let now = self.now;
            let node = self.nodes.get_mut(&name).unwrap();
            match what {
                0 => {
                    node.powered = false;
                    node.processes.clear();
                    said = Some("power off");
                }
                1 | 2 if !node.powered => {
                    power_on(node);
                    said = Some("power on");
                }
                3 => (node.network, said) = (false, Some("network off")),
                4 | 5 => (node.network, said) = (true, Some("network on")),
                6 => (node.storage, said) = (false, Some("storage off")),
                7 | 8 => (node.storage, said) = (true, Some("storage on")),
                9 => {
                    if let Some(guest) = node.processes.iter_mut().find(|p| p.alive) {
                        guest.alive = false;
                        said = Some("process killed");
                    }
                }
                10 | 11 => {
                    node.cordoned = true;
                    for pod in self
                        .pods
                        .iter_mut()
                        .filter(|p| p.node.as_ref() == Some(&name))
                    {
                        pod.deleting = true;
                        pod.leaving_since.get_or_insert(now);
                    }
                    said = Some("drain");
                }
                26 | 27 => {
                    (node.network, node.storage) = (false, false);
                    said = Some("frozen");
                }
                12 | 13 => (node.cordoned, said) = (false, Some("uncordon")),
                _ => {}
            }
        }
        said = self.cluster_fault(what).or(said);
        if let Some(said) = said {
            self.note(format!("FAULT {name}: {said}"));
        }
    }
}

fn power_on(node: &mut Node) {
    node.powered = true;
    node.steps_without_heartbeat = 0;
    // Joined generations are odd; an even one has not joined since its last boot.
    if node.owner.generation.0 % 2 == 1 {
        node.owner.generation = node.owner.generation.next();
    }
}

fn guest(
    pid: u32,
    state: VmState,
    epoch: Epoch,
    owner: Owner,
    incoming: Option<AttemptId>,
) -> Guest {
    Guest {
        pid,
        alive: true,
        state,
        epoch,
        owner,
        incoming,
        moving: None,
        power_button: false,
    }
}

fn begin(guest: &mut Guest, attempt: AttemptId, to: Owner, quick: bool) {
    let other = |moving: &Move| moving.attempt != attempt;
    if guest.moving.as_ref().is_none_or(other) {
        let phase = vm::MigrationPhase::Preparing;
        guest.moving = Some(Move {
            attempt,
            phase,
            to,
            quick,
        });
    }
}

fn view(node: &Node, now: Moment) -> NodeView {
    let up = node.powered && node.network;
    // The last report stays known when the stream breaks, but not its path.
    let path = if node.storage {
        PathState::Direct
    } else {
        PathState::Paused
    };
    NodeView {
        uid: Some(node.uid),
        cordoned: node.cordoned,
        kubelet_ready: Fact::Known(up),
        stream: if up {
            Stream::Up
        } else {
            Stream::Down { since: now }
        },
        kvm_error: None,
        access: Fact::Known(Access {
            path,
            reason: None,
            owner: Some(node.owner),
            watchdog: WatchdogKind::Hardware,
            coordinator: false,
        }),
    }
}

fn process(node: &str, guest: &Guest) -> Process {
    let migration = guest.moving.as_ref().map(|moving| MigrationStatus {
        attempt: moving.attempt,
        phase: moving.phase,
        rounds: 1,
        bytes: Bytes(0),
        remaining: Bytes(0),
        downtime_ms_predicted: None,
        downtime_ms: None,
        total_ms: 0,
        timings: vec![],
        failure: None,
    });
    Process {
        node: node.to_owned(),
        alive: guest.alive,
        status: VmStatus {
            owner: Some(guest.owner),
            epoch: guest.epoch,
            migration,
            ..VmStatus::bare(VmUid::from_bytes([7; 16]), guest.pid, guest.state.clone())
        },
    }
}
