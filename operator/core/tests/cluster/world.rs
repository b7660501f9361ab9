//! A cluster of three nodes, one volume and one virtual machine, as values.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use bascule_ipc::vm::{self, MigrationStatus, StopReason, VmState, VmStatus};
use bascule_ipc::volume::{FencingMode, PathState, WatchdogKind};
use bascule_operator_core::{
    Access, Action, Budgets, DrainPolicy, Fact, FailoverUpdate, FailoverView, FailurePolicy,
    History, Migration, MigrationMode, MigrationPhase, Moment, NodeView, Observed, Peer, Pod,
    PodPhase, Process, Purpose, RestartBudget, RowView, RunPolicy, SpecDigest, Stream, VmIntent,
    VmReport, VolumeView, plan,
};
use bascule_types::{AttemptId, Bytes, Epoch, Generation, NodeUid, Owner, SlotId, VmUid};
use bascule_volume_format::change::{Change, FenceProof, FenceRow, MissingProof, Refusal, RowName};

/// One step is this long.
const STEP_MS: u64 = 1000;
/// The heartbeat counts as silent after this many steps, the watchdog fires after, and a proof is
/// there after that.
const SILENT: u32 = 3;
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
    silent_steps: u32,
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
    history: History,
    view: Option<Observed>,
    dead_for: u32,
}

pub(crate) struct World {
    rng: u64,
    now: Moment,
    nodes: BTreeMap<String, Node>,
    row: Option<RowView>,
    pods: Vec<Pod>,
    bindings: BTreeMap<String, (Option<String>, Vec<String>)>,
    migrations: Vec<Migration>,
    failovers: Vec<(FailoverView, bool)>,
    operators: [Operator; 2],
    status: Option<VmReport>,
    run: RunPolicy,
    api_away_for: u32,
    next_id: u32,
    log: Vec<String>,
    pub(crate) operators_away: bool,
    pub(crate) migrations_fail: bool,
    finalizer: bool,
    last_cause: Moment,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
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
            silent_steps: 0,
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

    pub(crate) fn step(&mut self, faults: bool) {
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
    pub(crate) fn heal(&mut self) {
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

    pub(crate) fn running(&self) -> Vec<(String, u32)> {
        self.nodes
            .iter()
            .filter(|(_, node)| node.powered)
            .flat_map(|(name, node)| node.processes.iter().map(move |p| (name, p)))
            .filter(|(_, p)| p.alive && p.state == VmState::Running)
            .map(|(name, p)| (name.clone(), p.pid))
            .collect()
    }

    pub(crate) fn open_migrations(&self) -> usize {
        self.migrations
            .iter()
            .filter(|m| !m.phase.is_final())
            .count()
    }

    pub(crate) fn ask_for_migration(&mut self) {
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
    pub(crate) fn settled(&self) -> Result<(), String> {
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
        if self.open_migrations() > 0 {
            return Err(format!("migrations: {:?}", self.migrations));
        }
        if self.failovers.iter().any(|(_, closed)| !closed) {
            return Err(format!("failovers: {}", self.failovers.len()));
        }
        let idle = |p: &Guest| p.state == VmState::Running;
        if !self.nodes.values().flat_map(|n| &n.processes).all(idle) {
            return Err("processes are left over".to_owned());
        }
        Ok(())
    }

    pub(crate) fn trace(&self) -> String {
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

    fn note(&mut self, what: String) {
        self.log.push(format!("{} {what}", self.now.0 / STEP_MS));
    }

    fn fault(&mut self) {
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
                12 | 13 => (node.cordoned, said) = (false, Some("uncordon")),
                _ => {}
            }
        }
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
        if let Some(said) = said {
            self.note(format!("FAULT {name}: {said}"));
        }
    }

    // ---- nodes --------------------------------------------------------------------------------

    fn nodes_step(&mut self) {
        let names: Vec<String> = self.nodes.keys().cloned().collect();
        for name in &names {
            let node = self.nodes.get_mut(name).unwrap();
            if node.powered && node.storage {
                let joined = node.owner.generation.0 % 2 == 1;
                let lapsed = node.silent_steps >= SILENT && joined;
                node.silent_steps = 0;
                let owner = node.owner;
                if lapsed {
                    self.rejoin(name, owner, false);
                }
            } else {
                node.silent_steps += 1;
                if node.silent_steps == WATCHDOG && node.powered {
                    node.powered = false;
                    node.processes.clear();
                    self.note(format!("{name} reset by its watchdog"));
                }
            }
        }
        for name in &names {
            self.boot(name);
            let count = self.nodes[name].processes.len();
            for index in 0..count {
                self.guest_step(name, index);
            }
        }
    }

    /// A node that has come up begins a new generation; rows of the old one are released, because
    /// no process of it exists any more.
    fn boot(&mut self, name: &str) {
        let node = &self.nodes[name];
        if node.powered && node.storage && node.owner.generation.0 % 2 == 0 {
            let owner = node.owner;
            self.rejoin(name, owner, true);
        }
    }

    fn rejoin(&mut self, name: &str, from: Owner, rebooted: bool) {
        // Even generations mark a node that was switched on and has not joined yet.
        let step = if rebooted { 1 } else { 2 };
        let to = Owner {
            slot: from.slot,
            generation: Generation(from.generation.0 + step),
        };
        let before = if rebooted {
            Owner {
                slot: from.slot,
                generation: Generation(from.generation.0 - 1),
            }
        } else {
            from
        };
        self.nodes.get_mut(name).unwrap().owner = to;
        let Some(row) = &mut self.row else { return };
        let fenced = row.fences.iter().any(|fence| fence.victim == before);
        if row.owner == Some(before) && !fenced {
            row.owner = (!rebooted).then_some(to);
        }
        let kept = row.owner == Some(to);
        for guest in &mut self.nodes.get_mut(name).unwrap().processes {
            if kept {
                guest.owner = to;
            } else if guest.owner == before && guest.state == VmState::Running {
                // Its row is not its own any more: it kills itself.
                guest.alive = false;
            }
        }
    }

    fn guest_step(&mut self, name: &str, index: usize) {
        let node = &self.nodes[name];
        if !node.powered || !node.storage {
            return;
        }
        let guest = node.processes[index].clone();
        if !guest.alive {
            return;
        }
        let mut next = guest.clone();
        match &guest.state {
            VmState::Starting => next.state = VmState::Running,
            VmState::Running | VmState::Paused if guest.moving.is_some() => {
                self.move_step(name, &mut next);
            }
            VmState::Running if guest.power_button => {
                next.state = VmState::Stopped(StopReason::GuestShutdown);
                self.release(guest.owner, guest.epoch);
            }
            VmState::InDoubt => self.move_step(name, &mut next),
            _ => {}
        }
        self.nodes.get_mut(name).unwrap().processes[index] = next;
    }

    fn release(&mut self, owner: Owner, epoch: Epoch) {
        if let Some(row) = &mut self.row
            && row.owner == Some(owner)
            && row.epoch == epoch
        {
            row.owner = None;
        }
    }

    fn move_step(&mut self, name: &str, guest: &mut Guest) {
        let Some(mut moving) = guest.moving.clone() else {
            return;
        };
        let target = self.node_of(moving.to);
        let incoming = target.as_ref().is_some_and(|t| {
            moving.quick
                || self.nodes[t]
                    .processes
                    .iter()
                    .any(|p| p.alive && p.incoming == Some(moving.attempt))
        });
        let fails = self.migrations_fail && self.chance(3);
        moving.phase = match moving.phase {
            vm::MigrationPhase::Preparing if fails || !incoming => vm::MigrationPhase::Failed,
            vm::MigrationPhase::Preparing => vm::MigrationPhase::PreCopy,
            vm::MigrationPhase::PreCopy if fails || self.migrations_fail => {
                vm::MigrationPhase::NotConverging
            }
            vm::MigrationPhase::PreCopy if !incoming => vm::MigrationPhase::Failed,
            vm::MigrationPhase::PreCopy => {
                guest.state = VmState::Paused;
                vm::MigrationPhase::Stopping
            }
            vm::MigrationPhase::Stopping if !incoming => {
                guest.state = VmState::Running;
                vm::MigrationPhase::Failed
            }
            vm::MigrationPhase::Stopping => {
                guest.state = VmState::InDoubt;
                vm::MigrationPhase::Committing
            }
            vm::MigrationPhase::Committing => {
                self.commit(name, guest, &moving);
                if guest.state == VmState::Departed {
                    vm::MigrationPhase::Completed
                } else {
                    vm::MigrationPhase::Committing
                }
            }
            done => done,
        };
        guest.moving = Some(moving);
    }

    fn commit(&mut self, name: &str, guest: &mut Guest, moving: &Move) {
        let row = self.row.as_mut().unwrap();
        if row.owner != Some(guest.owner) || row.epoch != guest.epoch {
            // It was fenced in the meantime: it stops for good.
            guest.alive = false;
            return;
        }
        row.owner = Some(moving.to);
        row.epoch = row.epoch.next();
        row.saved = moving.quick;
        let epoch = row.epoch;
        guest.state = VmState::Departed;
        self.note(format!(
            "{name} handed over to {} in epoch {epoch}",
            moving.to
        ));
        let Some(target) = self.node_of(moving.to) else {
            return;
        };
        for process in &mut self.nodes.get_mut(&target).unwrap().processes {
            if process.alive && process.incoming == Some(moving.attempt) {
                process.state = VmState::Running;
                process.epoch = epoch;
                process.incoming = None;
            }
        }
    }

    fn node_of(&self, owner: Owner) -> Option<String> {
        let holds = |node: &&Node| node.owner == owner && node.powered;
        self.nodes
            .iter()
            .find(|(_, n)| holds(n))
            .map(|(name, _)| name.clone())
    }

    // ---- Kubernetes ---------------------------------------------------------------------------

    fn schedule(&mut self) {
        if self.api_away_for > 0 {
            self.api_away_for -= 1;
            return;
        }
        for index in 0..self.pods.len() {
            let pod = &self.pods[index];
            if pod.node.is_some() || pod.deleting || self.chance(2) {
                continue;
            }
            let (pin, avoid) = self.bindings[&self.pods[index].name].clone();
            let fits: Vec<String> = self
                .nodes
                .iter()
                .filter(|(name, node)| match &pin {
                    Some(pin) => *name == pin,
                    None => !node.cordoned && !avoid.contains(name),
                })
                .map(|(name, _)| name.clone())
                .collect();
            if fits.is_empty() {
                self.pods[index].unschedulable = Some("0/3 nodes are available".to_owned());
                continue;
            }
            let n = usize::try_from(self.random(fits.len() as u64)).unwrap();
            self.pods[index].node = Some(fits[n].clone());
            self.pods[index].phase = PodPhase::Running;
        }
        // An unbound pod that is deleted goes at once.
        self.pods
            .retain(|pod| !(pod.deleting && pod.node.is_none()));
    }

    // ---- operators ----------------------------------------------------------------------------

    fn operators_step(&mut self) {
        if self.operators_away {
            return;
        }
        for which in 0..2 {
            if self.operators[which].dead_for > 0 {
                self.operators[which].dead_for -= 1;
                self.operators[which].history = History::default();
                self.operators[which].view = None;
                continue;
            }
            // A stale view is one from some steps ago.
            let refresh = self.operators[which].view.is_none() || !self.chance(3);
            if refresh {
                self.operators[which].view = Some(self.observe());
            }
            let mut observed = self.operators[which].view.clone().unwrap();
            self.remember(which, &mut observed);
            let plan = plan(&self.intent(), &observed, self.now);
            let dies_after = if self.chance(10) {
                self.random(3)
            } else {
                u64::MAX
            };
            for (n, action) in (0..).zip(plan.actions) {
                if n >= dies_after {
                    break;
                }
                self.note(format!("op{which} {action:?}"));
                if !self.execute(which, action) {
                    break;
                }
            }
            if self.api_away_for == 0 {
                self.status = Some(plan.report);
            }
        }
    }

    fn remember(&self, which: usize, observed: &mut Observed) {
        observed.history = self.operators[which].history.clone();
        if let Some(status) = &self.status {
            observed.history.restarts = status.restarts.clone();
            observed.history.stopping_since = status.stopping_since;
            observed.history.completed = status.completed;
        }
    }

    fn intent(&self) -> VmIntent {
        VmIntent {
            uid: VmUid::from_bytes([7; 16]),
            namespace: "default".to_owned(),
            name: "web".to_owned(),
            row: RowName::new("default/web").unwrap(),
            volume: "san".to_owned(),
            run: self.run,
            deleting_since: None,
            finalizer: self.finalizer,
            digest: SpecDigest([1; 32]),
            disks: vec![],
            on_drain: DrainPolicy::LiveMigrate,
            on_failure: FailurePolicy::Restart,
            budgets: Budgets {
                downtime: Duration::from_millis(300),
                live: Duration::from_secs(20),
                quick: Duration::from_secs(15),
                shutdown: Duration::from_secs(10),
                bandwidth: None,
            },
            restart: RestartBudget {
                attempts_max: 5,
                window: Duration::from_secs(60),
                backoff: Duration::from_secs(1),
            },
        }
    }

    fn observe(&self) -> Observed {
        let watcher = self
            .nodes
            .values()
            .any(|n| n.powered && n.network && n.storage);
        let nodes = self
            .nodes
            .iter()
            .map(|(name, n)| (name.clone(), view(n, self.now)))
            .collect();
        let peers = self
            .nodes
            .values()
            .filter(|_| watcher)
            .map(|n| Peer {
                owner: n.owner,
                node: n.uid,
                alive: n.silent_steps < SILENT,
            })
            .collect();
        let processes = self
            .nodes
            .iter()
            .filter(|(_, n)| n.powered && n.network)
            .flat_map(|(name, n)| n.processes.iter().map(|p| process(name, p)))
            .collect();
        let open = self.failovers.iter().find(|(_, closed)| !closed);
        Observed {
            volume: Fact::Known(VolumeView {
                fencing: FencingMode::Watchdog,
                file: false,
                peers,
            }),
            nodes,
            row: match (&self.row, watcher) {
                (_, false) => Fact::Unknown,
                (None, _) => Fact::Absent,
                (Some(row), _) => Fact::Known(row.clone()),
            },
            pods: Fact::Known(self.pods.clone()),
            migrations: Fact::Known(self.migrations.clone()),
            failover: open.map_or(Fact::Absent, |(record, _)| Fact::Known(record.clone())),
            processes,
            imports: vec![],
            history: History::default(),
        }
    }

    fn execute(&mut self, which: usize, action: Action) -> bool {
        let api = self.api_away_for == 0;
        match action {
            Action::AddFinalizer => self.finalizer = true,
            Action::RemoveFinalizer => panic!("nobody deletes the virtual machine"),
            Action::Event { .. } => {}
            Action::CreateReservation {
                name,
                purpose,
                pin,
                avoid,
            } if api => {
                if self.pods.iter().all(|pod| pod.name != name) {
                    let uid = format!("{:08x}", self.id());
                    self.bindings.insert(name.clone(), (pin, avoid.clone()));
                    self.pods.push(Pod {
                        uid,
                        name,
                        purpose,
                        phase: PodPhase::Pending,
                        node: None,
                        leaving_since: None,
                        deleting: false,
                        unschedulable: None,
                        avoid,
                        digest: SpecDigest([1; 32]),
                    });
                }
            }
            Action::DeleteReservation { uid, force, .. } if api => {
                let now = self.now;
                if force {
                    self.pods.retain(|pod| pod.uid != uid);
                } else if let Some(pod) = self.pods.iter_mut().find(|pod| pod.uid == uid) {
                    pod.deleting = true;
                    pod.leaving_since.get_or_insert(now);
                }
            }
            Action::PromoteReservation { uid, .. } if api => {
                if let Some(pod) = self.pods.iter_mut().find(|pod| pod.uid == uid) {
                    pod.purpose = Purpose::Current;
                }
            }
            Action::CreateMigration { name, mode } if api => {
                if self.migrations.iter().all(|m| m.name != name) {
                    self.ask_for_migration();
                    let migration = self.migrations.last_mut().unwrap();
                    migration.name = name;
                    migration.mode = mode;
                    migration.drain = true;
                }
            }
            Action::ReportMigration { name, update } if api => {
                let now = self.now;
                let migration = self.migrations.iter_mut().find(|m| m.name == name).unwrap();
                if !migration.phase.is_final() {
                    migration.phase = update.phase;
                    migration.source = update.source;
                    migration.source_epoch = update.source_epoch;
                    migration.started.get_or_insert(now);
                    migration.reason = Some(update.reason.to_owned());
                }
            }
            Action::CreateFailover {
                name,
                node,
                owner,
                epoch,
            } if api => {
                if self.failovers.iter().all(|(f, _)| f.name != name) {
                    let view = FailoverView {
                        name,
                        node,
                        owner,
                        epoch,
                        taken_over: false,
                    };
                    self.failovers.push((view, false));
                }
            }
            Action::ReportFailover { name, update } if api => {
                let (view, closed) = self
                    .failovers
                    .iter_mut()
                    .find(|(f, _)| f.name == name)
                    .unwrap();
                match update {
                    FailoverUpdate::Suspected { .. } => {}
                    FailoverUpdate::TakenOver { .. } => view.taken_over = true,
                    FailoverUpdate::Succeeded { .. } | FailoverUpdate::Withdrawn { .. } => {
                        *closed = true;
                    }
                }
            }
            Action::Change { via, change } => return self.change(which, &via, change),
            Action::EndReservation { node, pod_uid } => {
                if self.reachable(&node) {
                    self.pods.retain(|pod| pod.uid != pod_uid || !pod.deleting);
                }
            }
            other => return self.command(which, other),
        }
        true
    }

    fn reachable(&self, node: &str) -> bool {
        self.nodes.get(node).is_some_and(|n| n.powered && n.network)
    }

    fn change(&mut self, which: usize, via: &str, change: Change) -> bool {
        let via_works = self.reachable(via) && self.nodes[via].storage;
        if !via_works {
            return false;
        }
        if let Change::CreateVm { .. } = change {
            self.row.get_or_insert_default();
            return true;
        }
        let Some(row) = self.row.clone() else {
            return false;
        };
        match change {
            Change::Acquire {
                expected_epoch, to, ..
            } => {
                let holder = self.node_of(to).is_some_and(|n| self.nodes[&n].storage);
                if row.owner.is_some() || row.epoch != expected_epoch || !holder {
                    return false;
                }
                self.own(to);
            }
            Change::Release { from, epoch, .. } => {
                let busy = self.nodes[via].processes.iter().any(|p| {
                    p.alive && p.epoch == epoch && !matches!(p.state, VmState::Stopped(_))
                });
                if busy {
                    return false;
                }
                self.release(from, epoch);
            }
            Change::TakeOver {
                from, epoch, to, ..
            } => {
                let holder = self.node_of(to).is_some_and(|n| self.nodes[&n].storage);
                if row.owner != Some(from) || row.epoch != epoch || !holder {
                    return false;
                }
                let victim = self
                    .nodes
                    .values()
                    .find(|n| n.owner.slot == from.slot)
                    .unwrap();
                let proved = victim.silent_steps >= SAFE
                    || row.fences.iter().any(|fence| fence.victim == from);
                if !proved {
                    self.operators[which].history.takeover_refusal = Some(Refusal::NotFenced {
                        victim: from,
                        missing: MissingProof::Alive,
                    });
                    return false;
                }
                let proof = FenceProof::SafeTimeElapsed {
                    watched_ms: 7,
                    required_ms: 7,
                };
                let row = self.row.as_mut().unwrap();
                row.fences.push(FenceRow {
                    victim: from,
                    proof,
                });
                self.own(to);
            }
            other => panic!("not asked of this world: {other:?}"),
        }
        true
    }

    fn own(&mut self, to: Owner) {
        let row = self.row.as_mut().unwrap();
        row.owner = Some(to);
        row.epoch = row.epoch.next();
    }

    fn command(&mut self, which: usize, action: Action) -> bool {
        let pid = self.id();
        let row = self.row.clone().unwrap_or_default();
        // A stale view knows of a cause that has gone in the meantime.
        let cause = self.now.since(self.last_cause) < Duration::from_secs(20);
        let node_name = match &action {
            Action::StartVm { node, .. }
            | Action::PrepareIncoming { node, .. }
            | Action::MigrateLive { node, .. }
            | Action::MigrateQuick { node, .. }
            | Action::CancelMigration { node, .. }
            | Action::PowerButton { node }
            | Action::StopVm { node }
            | Action::CollectVm { node, .. } => node.clone(),
            // The API is away.
            _ => return false,
        };
        if !self.reachable(&node_name) {
            return false;
        }
        let node = self.nodes.get_mut(&node_name).unwrap();
        let storage = node.storage;
        let mine = node
            .processes
            .iter_mut()
            .find(|p| p.alive && p.owner == node.owner);
        let running = mine.filter(|p| matches!(p.state, VmState::Running));
        match action {
            Action::StartVm { owner, epoch, .. } => {
                let exists = node.processes.iter().any(|p| p.alive && p.epoch == epoch);
                if exists || row.owner != Some(owner) || row.epoch != epoch || !storage {
                    return false;
                }
                node.processes
                    .push(guest(pid, VmState::Starting, epoch, owner, None));
                self.row.as_mut().unwrap().saved = false;
            }
            Action::PrepareIncoming {
                attempt,
                owner,
                epoch,
                ..
            } => {
                if node.processes.iter().all(|p| p.incoming != Some(attempt)) {
                    let made = guest(pid, VmState::Incoming, epoch, owner, Some(attempt));
                    node.processes.push(made);
                }
                let address = "10.0.0.1:7000".parse().unwrap();
                self.operators[which].history.listening = Some((attempt, address));
            }
            Action::MigrateLive { attempt, to, .. } => begin(running, attempt, to, false),
            Action::MigrateQuick { attempt, to, .. } => begin(running, attempt, to, true),
            Action::CancelMigration { attempt, .. } => {
                for guest in &mut node.processes {
                    if let Some(moving) = &mut guest.moving
                        && moving.attempt == attempt
                        && matches!(
                            moving.phase,
                            vm::MigrationPhase::Preparing | vm::MigrationPhase::PreCopy
                        )
                    {
                        moving.phase = vm::MigrationPhase::Cancelled;
                        guest.state = VmState::Running;
                    }
                }
            }
            Action::PowerButton { .. } => {
                assert!(cause, "without cause\n{}", self.trace());
                if let Some(guest) = running {
                    guest.power_button = true;
                }
            }
            Action::StopVm { .. } => {
                assert!(cause, "without cause\n{}", self.trace());
                if let Some(guest) = running {
                    guest.state = VmState::Stopped(StopReason::Requested);
                    let (owner, epoch) = (guest.owner, guest.epoch);
                    self.release(owner, epoch);
                }
            }
            Action::CollectVm { pid, .. } => node.processes.retain(|p| {
                let over = !p.alive
                    || matches!(
                        p.state,
                        VmState::Stopped(_) | VmState::Departed | VmState::Incoming
                    );
                p.pid != pid || !over
            }),
            _ => return false,
        }
        true
    }
}

fn power_on(node: &mut Node) {
    node.powered = true;
    node.silent_steps = 0;
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

fn begin(running: Option<&mut Guest>, attempt: AttemptId, to: Owner, quick: bool) {
    if let Some(guest) = running
        && guest
            .moving
            .as_ref()
            .is_none_or(|moving| moving.attempt != attempt)
    {
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
        access: Some(Access {
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
            uid: VmUid::from_bytes([7; 16]),
            release: "0".to_owned(),
            pid: guest.pid,
            state: guest.state.clone(),
            owner: Some(guest.owner),
            epoch: guest.epoch,
            listening: None,
            migration,
            io_stalled: false,
            addresses: vec![],
        },
    }
}
