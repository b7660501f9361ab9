//! The test fixture: builder methods that start from a healthy cluster.

use std::time::Duration;

use bascule_ipc::vm::{MigrationPhase as Copy, MigrationStatus, VmState, VmStatus};
use bascule_ipc::volume::{FencingMode, PathState, WatchdogKind};
use bascule_types::{
    AttemptId, Bytes, Change, DiskId, DiskRole, DiskRow, Epoch, FenceProof, FenceRow, Generation,
    NodeUid, Owner, RowName, SlotId, VmUid,
};

use crate::MigrationPhase;
use crate::{
    Access, Action, Budgets, DiskIntent, DrainPolicy, Fact, FailoverView, FailurePolicy,
    ImageSource, Migration, MigrationMode, Moment, NodeView, Observed, Origin, Peer, Plan, Pod,
    PodPhase, Process, Purpose, RestartBudget, RowView, RunPolicy, SpecDigest, Stream, VmIntent,
    VolumeView, plan,
};

pub(super) const NOW: Moment = Moment(1_000_000_000);
const VM: VmUid = VmUid::from_bytes([7; 16]);

/// The open Failover of node-1's outage.
pub(super) fn failover(epoch: Epoch) -> FailoverView {
    FailoverView {
        name: format!("web-{epoch}"),
        node: "node-1".to_owned(),
        owner: node_owner(1),
        epoch,
        taken_over: false,
        closed: false,
    }
}

pub(super) fn node_owner(slot: u16) -> Owner {
    Owner {
        slot: SlotId(slot),
        generation: Generation(1),
    }
}

fn node_uid(slot: u16) -> NodeUid {
    NodeUid::from_bytes([u8::try_from(slot).unwrap() + 1; 16])
}

fn row_name(disk: &str) -> RowName {
    RowName::new(format!("default/web.{disk}")).unwrap()
}

#[derive(Clone)]
pub(super) struct Case {
    pub(super) intent: VmIntent,
    pub(super) observed: Observed,
    pub(super) now: Moment,
}

impl Case {
    /// Three healthy nodes, a volume, a row without owner in epoch 4; it should run.
    pub(super) fn new() -> Self {
        let nodes = (0..3_u16).map(|slot| {
            let access = Access {
                path: PathState::Direct,
                reason: None,
                owner: Some(node_owner(slot)),
                watchdog: WatchdogKind::Hardware,
                coordinator: slot == 0,
            };
            let view = NodeView {
                uid: Some(node_uid(slot)),
                kubelet_ready: Fact::Known(true),
                stream: Stream::Up,
                access: Fact::Known(access),
                ..NodeView::default()
            };
            (format!("node-{slot}"), view)
        });
        let peers = (0..3_u16).map(|slot| Peer {
            owner: node_owner(slot),
            node: node_uid(slot),
            alive: true,
        });
        let observed = Observed {
            volume: Fact::Known(VolumeView {
                fencing: FencingMode::Watchdog,
                file: false,
                identified: true,
                peers: peers.collect(),
            }),
            nodes: nodes.collect(),
            row: Fact::Known(RowView {
                epoch: Epoch(4),
                ..RowView::default()
            }),
            pods: Fact::Known(vec![]),
            migrations: Fact::Known(vec![]),
            failovers: Fact::Known(vec![]),
            ..Observed::default()
        };
        Self {
            intent: intent(),
            observed,
            now: NOW,
        }
    }

    /// The guest runs on that node in epoch 5, and its reservation is there.
    pub(super) fn running_on(slot: u16) -> Self {
        Self::new()
            .owned_by(slot)
            .with_pod(&format!("node-{slot}"))
            .with_process(slot, VmState::Running, Epoch(5))
    }

    pub(super) fn plan(&self) -> Plan {
        plan(&self.intent, &self.observed, self.now)
    }

    /// Whether the plan has such an action.
    pub(super) fn plans(&self, such: impl Fn(&Action) -> bool) -> bool {
        self.plan().actions.iter().any(such)
    }

    pub(super) fn changes(&self) -> Vec<Change> {
        self.plan()
            .actions
            .into_iter()
            .filter_map(|action| match action {
                Action::Change { change, .. } => Some(change),
                _ => None,
            })
            .collect()
    }

    /// The mode of the migration that the plan creates.
    pub(super) fn created_migration(&self) -> Option<MigrationMode> {
        self.plan().actions.iter().find_map(|action| match action {
            Action::CreateMigration { mode, .. } => Some(*mode),
            _ => None,
        })
    }

    /// How the plan ends a migration.
    pub(super) fn migration_end(&self, wanted: &str) -> Option<(MigrationPhase, &'static str)> {
        self.plan().actions.iter().find_map(|action| match action {
            Action::ReportMigration { name, update }
                if name == wanted && update.phase.is_final() =>
            {
                Some((update.phase, update.reason))
            }
            _ => None,
        })
    }

    pub(super) fn deleted_disks(&self) -> Vec<String> {
        let Fact::Known(row) = &self.observed.row else {
            return vec![];
        };
        let mut names: Vec<String> = self
            .changes()
            .iter()
            .filter_map(|change| match change {
                Change::DeleteDisk { disk } => row.disks.iter().find(|r| r.disk == *disk),
                _ => None,
            })
            .filter_map(|r| {
                r.name
                    .as_str()
                    .split_once('.')
                    .map(|(_, disk)| disk.to_owned())
            })
            .collect();
        names.sort_unstable();
        names
    }

    // ---- what is different --------------------------------------------------------------------

    pub(super) fn node(&mut self, name: &str) -> &mut NodeView {
        self.observed.nodes.get_mut(name).unwrap()
    }

    pub(super) fn access(&mut self, name: &str) -> &mut Access {
        match &mut self.node(name).access {
            Fact::Known(access) => access,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn volume(&mut self) -> &mut VolumeView {
        let Fact::Known(volume) = &mut self.observed.volume else {
            panic!("no volume")
        };
        volume
    }

    pub(super) fn row(&mut self) -> &mut RowView {
        let Fact::Known(row) = &mut self.observed.row else {
            panic!("no row")
        };
        row
    }

    fn pods(&mut self) -> &mut Vec<Pod> {
        let Fact::Known(pods) = &mut self.observed.pods else {
            panic!("no pods")
        };
        pods
    }

    pub(super) fn pod(&mut self, index: usize) -> &mut Pod {
        &mut self.pods()[index]
    }

    fn migrations(&mut self) -> &mut Vec<Migration> {
        let Fact::Known(migrations) = &mut self.observed.migrations else {
            panic!("none")
        };
        migrations
    }

    pub(super) fn migration(&mut self, index: usize) -> &mut Migration {
        &mut self.migrations()[index]
    }

    pub(super) fn owned_by(mut self, slot: u16) -> Self {
        self.row().owner = Some(node_owner(slot));
        self.row().epoch = Epoch(5);
        self
    }

    pub(super) fn with_pod(self, node: &str) -> Self {
        self.with_pod_for(Purpose::Current, node)
    }

    pub(super) fn with_migration_pod(self, migration: &str, node: &str) -> Self {
        self.with_pod_for(Purpose::Migration(migration.to_owned()), node)
    }

    fn with_pod_for(mut self, purpose: Purpose, node: &str) -> Self {
        let n = self.pods().len();
        self.pods().push(Pod {
            uid: format!("{n:08x}-pod"),
            name: format!("web-e5-{n}"),
            purpose,
            phase: PodPhase::Running,
            node: Some(node.to_owned()),
            leaving_since: None,
            deleting: false,
            unschedulable: None,
            avoid: vec![],
            digest: SpecDigest([1; 32]),
            copies_current: true,
        });
        self
    }

    pub(super) fn with_process(mut self, slot: u16, state: VmState, epoch: Epoch) -> Self {
        let pid = 100 + u32::try_from(self.observed.processes.len()).unwrap();
        self.observed.processes.push(Process {
            node: format!("node-{slot}"),
            alive: true,
            status: VmStatus {
                owner: Some(node_owner(slot)),
                epoch,
                ..VmStatus::bare(VM, pid, state)
            },
        });
        self
    }

    pub(super) fn with_incoming(mut self, slot: u16, address: &str) -> Self {
        self = self.with_process(slot, VmState::Incoming, Epoch(5));
        let process = self.observed.processes.last_mut().unwrap();
        process.status.listening = Some(address.parse().unwrap());
        self
    }

    pub(super) fn process_is(mut self, state: VmState) -> Self {
        self.observed.processes[0].status.state = state;
        self
    }

    pub(super) fn draining(mut self) -> Self {
        self.pod(0).deleting = true;
        self.pod(0).leaving_since = Some(NOW);
        self
    }

    pub(super) fn with_migration(mut self, name: &str, mode: MigrationMode) -> Self {
        let n = u64::try_from(self.migrations().len()).unwrap();
        self.migrations().push(Migration {
            name: name.to_owned(),
            attempt: attempt(),
            created: Moment(NOW.0 + n),
            mode,
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
        self
    }

    pub(super) fn with_drain_migration(
        mut self,
        mode: MigrationMode,
        ordinal: u32,
        phase: MigrationPhase,
    ) -> Self {
        let word = if mode == MigrationMode::Live {
            "live"
        } else {
            "quick"
        };
        self = self.with_migration(&format!("web-drain-00000000-{word}-{ordinal}"), mode);
        let last = self.migrations().last_mut().unwrap();
        last.drain = true;
        last.phase = phase;
        self
    }

    /// The migration left node-1 in epoch 5 just now.
    pub(super) fn begun(&mut self, index: usize) {
        let migration = self.migration(index);
        migration.phase = MigrationPhase::Placing;
        migration.started = Some(NOW);
        migration.source = Some("node-1".to_owned());
        migration.source_epoch = Some(Epoch(5));
    }

    /// What the source says of the attempt.
    pub(super) fn copying(mut self, phase: Copy) -> Self {
        self.observed.processes[0].status.migration = Some(MigrationStatus {
            attempt: attempt(),
            phase,
            rounds: 2,
            bytes: Bytes(1 << 20),
            remaining: Bytes(0),
            downtime_ms_predicted: Some(20),
            downtime_ms: None,
            total_ms: 100,
            timings: vec![],
            failure: None,
        });
        self
    }

    pub(super) fn heartbeat(mut self, slot: u16, alive: bool) -> Self {
        self.volume().peers[usize::from(slot)].alive = alive;
        self
    }

    /// Neither daemon nor heartbeat of that node responds.
    pub(super) fn unresponsive(mut self, slot: u16) -> Self {
        self.node(&format!("node-{slot}")).stream = Stream::Down { since: NOW };
        self.heartbeat(slot, false)
    }

    pub(super) fn with_failover(self, epoch: Epoch) -> Self {
        self.with_failovers(vec![failover(epoch)])
    }

    pub(super) fn with_failovers(mut self, records: Vec<FailoverView>) -> Self {
        self.observed.failovers = Fact::Known(records);
        self
    }

    pub(super) fn fenced(mut self, slot: u16) -> Self {
        let proof = FenceProof::SafeTimeElapsed {
            watched_ms: 28_000,
            required_ms: 27_000,
        };
        self.row().fences.push(FenceRow {
            victim: node_owner(slot),
            proof,
        });
        self
    }

    /// A kernel, a kept disk and one that goes with the virtual machine; all on the volume.
    pub(super) fn with_disks(mut self) -> Self {
        let kernel = Origin::Image {
            size: Bytes::mib(64),
            source: ImageSource::HostFile {
                name: "kernel".to_owned(),
            },
        };
        let blank = || Origin::Blank {
            size: Bytes::gib(1),
        };
        self.intent.disks = vec![
            disk("boot-kernel", DiskRole::Kernel, kernel, true),
            disk("root", DiskRole::Data, blank(), false),
            disk("scratch", DiskRole::Data, blank(), true),
        ];
        self.row().disks = (1_u8..)
            .zip(["boot-kernel", "root", "scratch"])
            .map(|(n, name)| DiskRow {
                disk: DiskId::from_bytes([n; 16]),
                name: row_name(name),
                vm: Some(VM),
                size: Bytes::gib(1),
                role: DiskRole::Data,
                importing: false,
                importer: None,
                extents: vec![],
            })
            .collect();
        self
    }
}

fn attempt() -> AttemptId {
    AttemptId::from_bytes([9; 16])
}

fn disk(name: &str, role: DiskRole, origin: Origin, delete_with_vm: bool) -> DiskIntent {
    DiskIntent {
        name: name.to_owned(),
        row: row_name(name),
        role,
        origin,
        delete_with_vm,
        on_error: bascule_crds::OnError::Report,
    }
}

fn intent() -> VmIntent {
    VmIntent {
        uid: VM,
        namespace: "default".to_owned(),
        name: "web".to_owned(),
        row: RowName::new("default/web").unwrap(),
        volume: "san".to_owned(),
        run: RunPolicy::Always,
        deleting_since: None,
        finalizer: true,
        digest: SpecDigest([1; 32]),
        disks: vec![],
        on_drain: DrainPolicy::LiveMigrate,
        on_failure: FailurePolicy::Restart,
        budgets: Budgets {
            downtime: Duration::from_millis(300),
            live: Duration::from_secs(300),
            quick: Duration::from_secs(180),
            shutdown: Duration::from_secs(120),
            bandwidth: None,
        },
        restart: RestartBudget {
            attempts_max: 5,
            window: Duration::from_secs(600),
            backoff: Duration::from_secs(10),
        },
    }
}
