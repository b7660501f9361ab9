//! What Kubernetes does, what operators see, and what becomes of their actions.

use std::time::Duration;

use bascule_ipc::vm::{self, StopReason, VmState};
use bascule_ipc::volume::FencingMode;
use bascule_types::{
    Change, FenceProof, FenceRow, MissingProof, Owner, Ownership, Refusal, RowName, VmUid,
};

use super::{Guest, SAFE, SUSPECTED, World, begin, guest, process, view};
use crate::{
    Action, Budgets, DrainPolicy, Fact, FailoverUpdate, FailoverView, FailurePolicy, Observed,
    Peer, PlannerMemory, Pod, PodPhase, Purpose, Reported, RestartBudget, SpecDigest, VmIntent,
    VolumeView, plan,
};

impl World {
    pub(super) fn schedule(&mut self) {
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

    pub(super) fn operators_step(&mut self) {
        if self.operators_away {
            return;
        }
        for which in 0..2 {
            if self.operators[which].dead_for > 0 {
                self.operators[which].dead_for -= 1;
                self.operators[which].memory = PlannerMemory::default();
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
            self.operators[which].memory.unknown_since = plan.report.unknown_since;
            self.operators[which].memory.target_lost = plan.report.target_lost;
            if self.api_away_for == 0 && !plan.report.keep {
                self.status = Some(plan.report);
            }
        }
    }

    pub(super) fn remember(&self, which: usize, observed: &mut Observed) {
        observed.memory = self.operators[which].memory.clone();
        if let Some(status) = &self.status {
            observed.memory.restarts = status.restarts.clone();
            observed.memory.stopping_since = status.stopping_since;
            observed.memory.completed = status.completed;
            observed.memory.reported = Some(Reported {
                phase: status.phase,
                node: status.node.clone(),
            });
        }
    }

    pub(super) fn intent(&self) -> VmIntent {
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

    pub(super) fn observe(&self) -> Observed {
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
                alive: n.steps_without_heartbeat < SUSPECTED,
            })
            .collect();
        let processes = self
            .nodes
            .iter()
            .filter(|(_, n)| n.powered && n.network)
            .flat_map(|(name, n)| n.processes.iter().map(|p| process(name, p)))
            .collect();
        Observed {
            volume: Fact::Known(VolumeView {
                fencing: FencingMode::Watchdog,
                file: false,
                identified: true,
                peers,
            }),
            nodes,
            row: match (&self.row, watcher) {
                (_, false) => Fact::Unknown,
                (None, _) => Fact::Absent,
                (Some(row), _) => Fact::Known(row.clone()),
            },
            last_owner: (self.row.as_ref()).and_then(|row| Some((row.owner?, row.epoch))),
            pods: Fact::Known(self.pods.clone()),
            foreign_pods: vec![],
            migrations: Fact::Known(self.migrations.clone()),
            failovers: Fact::Known(self.failovers.clone()),
            processes,
            imports: vec![],
            memory: PlannerMemory::default(),
        }
    }

    #[expect(clippy::too_many_lines, reason = "one arm for each action")]
    pub(super) fn execute(&mut self, which: usize, action: Action) -> bool {
        let api = self.api_away_for == 0;
        match action {
            Action::AddFinalizer => self.finalizer = true,
            Action::RemoveFinalizer => panic!("the simulation deletes no virtual machine"),
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
                        copies_current: true,
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
                if self.failovers.iter().all(|f| f.name != name) {
                    self.failovers.push(FailoverView {
                        name,
                        node,
                        owner,
                        epoch,
                        taken_over: false,
                        closed: false,
                    });
                }
            }
            Action::ReportFailover { name, update } if api => {
                let record = self.failovers.iter_mut().find(|f| f.name == name).unwrap();
                match update {
                    FailoverUpdate::Suspected { .. } => {}
                    FailoverUpdate::TakenOver { .. } => record.taken_over = true,
                    FailoverUpdate::Succeeded { .. } => {
                        record.taken_over = true;
                        record.closed = true;
                    }
                    FailoverUpdate::Withdrawn { .. } => record.closed = true,
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

    pub(super) fn reachable(&self, node: &str) -> bool {
        self.nodes.get(node).is_some_and(|n| n.powered && n.network)
    }

    pub(super) fn change(&mut self, which: usize, via: &str, change: Change) -> bool {
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
                if row.owner.is_some() || row.epoch != expected_epoch || !self.has_path(to) {
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
            Change::DropSavedState { from, epoch, .. }
                if row.owner == Some(from) && row.epoch == epoch =>
            {
                self.row.as_mut().unwrap().saved = None;
            }
            Change::TakeOver {
                from, epoch, to, ..
            } => {
                if row.owner != Some(from) || row.epoch != epoch || !self.has_path(to) {
                    return false;
                }
                let victim = self
                    .nodes
                    .values()
                    .find(|n| n.owner.slot == from.slot)
                    .unwrap();
                let proved = victim.steps_without_heartbeat >= SAFE
                    || row.fences.iter().any(|fence| fence.victim == from);
                if !proved {
                    self.operators[which].memory.takeover_refusal = Some(Refusal::NotFenced {
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
                self.takeovers.push(Ownership::new(from, epoch));
                self.own(to);
            }
            other => panic!("not supported by this model: {other:?}"),
        }
        true
    }

    /// Whether the holder of `owner`'s slot reaches the volume.
    fn has_path(&self, owner: Owner) -> bool {
        self.node_of(owner)
            .is_some_and(|node| self.nodes[&node].storage)
    }

    pub(super) fn own(&mut self, to: Owner) {
        let row = self.row.as_mut().unwrap();
        row.owner = Some(to);
        row.epoch = row.epoch.next();
    }

    #[expect(
        clippy::too_many_lines,
        clippy::needless_pass_by_value,
        reason = "one arm for each action, as the node receives it"
    )]
    pub(super) fn command(&mut self, which: usize, action: Action) -> bool {
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
            Action::StartVm {
                owner,
                epoch,
                restore,
                ..
            } => {
                // One that has ended too, unless it was to restore the guest.
                let exists = |p: &Guest| p.epoch == epoch && (p.alive || !restore);
                let exists = node.processes.iter().any(exists);
                if exists || row.owner != Some(owner) || row.epoch != epoch || !storage {
                    return false;
                }
                let restorable = row.saved.is_some_and(|saved| saved.is_restorable(epoch));
                if restore && !restorable {
                    // By a stale view: it was restored already, and the process looks before it does.
                    return false;
                }
                assert!(
                    restore || !restorable,
                    "boots in spite of {:?}\n{}",
                    row.saved,
                    self.trace()
                );
                let is_first = restore || self.booted.insert(epoch);
                assert!(is_first, "I1: boots again in {epoch}\n{}", self.trace());
                let node = self.nodes.get_mut(&node_name).unwrap();
                // What is left of an ended one is cleared away.
                node.processes.retain(|p| p.alive);
                node.processes
                    .push(guest(pid, VmState::Starting, epoch, owner, None));
                if restore {
                    self.row.as_mut().unwrap().saved = None;
                }
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
                self.operators[which].memory.listening = Some((attempt, address));
            }
            Action::MigrateLive {
                pid, attempt, to, ..
            }
            | Action::MigrateQuick {
                pid, attempt, to, ..
            } => {
                let quick = matches!(action, Action::MigrateQuick { .. });
                let Some(guest) = running.filter(|guest| guest.pid == pid) else {
                    return false;
                };
                begin(guest, attempt, to, quick);
                self.operators[which].memory.move_begun = Some((attempt, pid));
            }
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
