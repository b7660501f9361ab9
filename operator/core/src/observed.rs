//! What is known about one virtual machine and what surrounds it.
//!
//! Three sources, which may disagree and may be stale: the API (pods, migrations, nodes), the
//! daemons' reports (processes, imports, paths), and the volume (the row, through whichever daemon
//! answers; of two answers the one with the higher coordinator epoch counts).

use std::collections::BTreeMap;
use std::net::SocketAddr;

use bascule_crds::{MigrationMode, MigrationPhase, Phase};
use bascule_ipc::vm::VmStatus;
use bascule_ipc::volume::{FencingMode, PathState, WatchdogKind};
use bascule_types::{AttemptId, Bytes, DiskId, DiskRow, Epoch, FenceRow, NodeUid, Owner, Refusal};

use crate::action::Purpose;
use crate::{Fact, Moment, SpecDigest};

/// The inputs of a plan that are observed rather than asked for.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// The SharedVolume.
    pub volume: Fact<VolumeView>,
    /// Every node that runs, or ran, our daemon, by name.
    pub nodes: BTreeMap<String, NodeView>,
    /// The virtual machine's row.
    pub row: Fact<RowView>,
    /// Its reservation pods.
    pub pods: Fact<Vec<Pod>>,
    /// Its migrations, finished ones too.
    pub migrations: Fact<Vec<Migration>>,
    /// Its Failover records, closed ones too.
    pub failovers: Fact<Vec<FailoverView>>,
    /// Its processes, as last reported by each node.
    pub processes: Vec<Process>,
    /// The imports of its disks.
    pub imports: Vec<ImportView>,
    /// What the planner remembers of earlier plans.
    pub memory: PlannerMemory,
}

/// The SharedVolume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeView {
    /// How nodes that stopped responding are fenced.
    pub fencing: FencingMode,
    /// Whether it is a file.
    pub file: bool,
    /// Whether its identity is known. Before that no virtual machine can have been recorded on it.
    pub identified: bool,
    /// The heartbeat of every slot, as seen by other nodes.
    pub peers: Vec<Peer>,
}

/// A slot's heartbeat, as another node sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The slot and its present generation.
    pub owner: Owner,
    /// The node that holds it.
    pub node: NodeUid,
    /// Whether the heartbeat moved within the lease time.
    pub alive: bool,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeView {
    /// Its UID.
    pub uid: Option<NodeUid>,
    /// Whether it is cordoned.
    pub cordoned: bool,
    /// What its kubelet says. Reported, never acted on: guests do not need a kubelet.
    pub kubelet_ready: Fact<bool>,
    /// The stream of reports from its daemon.
    pub stream: Stream,
    /// Why it cannot run guests.
    pub kvm_error: Option<String>,
    /// How it reaches this virtual machine's volume: absent when that is not attached there, unknown
    /// while the volume's process there does not say.
    pub access: Fact<Access>,
}

/// The stream of reports from a daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stream {
    /// Not tried yet.
    #[default]
    Unknown,
    /// Reports come.
    Up,
    /// No reports come.
    Down {
        /// Since when.
        since: Moment,
    },
}

/// How a node reaches a volume, by its own account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// The path.
    pub path: PathState,
    /// Why the path is not direct.
    pub reason: Option<String>,
    /// Its slot and generation.
    pub owner: Option<Owner>,
    /// Its watchdog.
    pub watchdog: WatchdogKind,
    /// Whether it is the coordinator.
    pub coordinator: bool,
}

/// The virtual machine's row, and what hangs on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowView {
    /// The owner; none while it is stopped.
    pub owner: Option<Owner>,
    /// Rises with every transfer of the ownership.
    pub epoch: Epoch,
    /// Its disks, and the kept ones of the volume.
    pub disks: Vec<DiskRow>,
    /// The memory of a guest, saved by a quick migration or left by one that broke off.
    pub saved: Option<SavedView>,
    /// The fence proofs recorded on the volume.
    pub fences: Vec<FenceRow>,
}

/// A saved state on the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedView {
    /// The epoch that saved it.
    pub epoch: Epoch,
    /// Whether all of it is there.
    pub complete: bool,
}

impl SavedView {
    /// Whether a guest may be restored from it in `epoch`: only in the very next one, because
    /// a later owner may have written to the disks since.
    #[must_use]
    pub fn is_restorable(self, epoch: Epoch) -> bool {
        self.complete && self.epoch.next() == epoch
    }
}

/// A reservation pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its UID.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// What it is there for.
    pub purpose: Purpose,
    /// Where it stands.
    pub phase: PodPhase,
    /// The node that it is bound to.
    pub node: Option<String>,
    /// Since when it is to leave: its deletion was asked for, or the kubelet evicted it.
    pub leaving_since: Option<Moment>,
    /// Whether it has a deletion timestamp.
    pub deleting: bool,
    /// Why the scheduler finds no node.
    pub unschedulable: Option<String>,
    /// The nodes that it was told not to land on.
    pub avoid: Vec<String>,
    /// The digest of the spec that it was made for.
    pub digest: SpecDigest,
}

/// A pod's phase, with evictions told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodPhase {
    /// Not yet running.
    Pending,
    /// Running.
    Running,
    /// Ended by eviction: the kubelet wants the virtual machine off the node.
    Evicted,
    /// Ended otherwise.
    Failed,
}

/// A VirtualMachineMigration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migration {
    /// Its name.
    pub name: String,
    /// Its UID: the attempt.
    pub attempt: AttemptId,
    /// When it was created.
    pub created: Moment,
    /// How to move.
    pub mode: MigrationMode,
    /// Where to, if that was asked for.
    pub target: Option<String>,
    /// Limits that differ from the virtual machine's.
    pub downtime: Option<std::time::Duration>,
    /// The same for its time limit.
    pub timeout: Option<std::time::Duration>,
    /// The same for its bandwidth.
    pub bandwidth: Option<u64>,
    /// Whether it is to be given up.
    pub cancel: bool,
    /// Whether a drain made it.
    pub drain: bool,
    /// Where it stands.
    pub phase: MigrationPhase,
    /// When it began.
    pub started: Option<Moment>,
    /// The node that it leaves.
    pub source: Option<String>,
    /// The epoch that it began in.
    pub source_epoch: Option<Epoch>,
    /// The reason that it ended for.
    pub reason: Option<String>,
}

/// A Failover record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailoverView {
    /// Its name.
    pub name: String,
    /// The node that stopped responding.
    pub node: String,
    /// Its slot and generation.
    pub owner: Owner,
    /// The epoch that it owned the row in.
    pub epoch: Epoch,
    /// Whether the takeover is on record.
    pub taken_over: bool,
    /// Whether it has come to its end.
    pub closed: bool,
}

/// A VM process, as its node reported it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// The node.
    pub node: String,
    /// Whether it exists.
    pub alive: bool,
    /// Its status; the last one known.
    pub status: VmStatus,
}

/// An import.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportView {
    /// The node that does it.
    pub node: String,
    /// The disk.
    pub disk: DiskId,
    /// Bytes written.
    pub written: Bytes,
    /// Where it stands.
    pub phase: ImportPhase,
}

/// Where an import stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImportPhase {
    /// Going on.
    Running,
    /// Written, flushed, checked.
    Complete {
        /// The image's length.
        length: Bytes,
    },
    /// Failed.
    Failed {
        /// Why.
        message: String,
    },
}

/// The last status that any operator wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reported {
    /// What the virtual machine was doing.
    pub phase: Phase,
    /// Where.
    pub node: Option<String>,
}

/// What the planner remembers between plans, from the status or from this operator's memory. All of it
/// may be lost with a restart; an action is then repeated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlannerMemory {
    /// The restarts that may still count.
    pub restarts: Vec<Moment>,
    /// Since when the guest has been asked to shut down.
    pub stopping_since: Option<Moment>,
    /// Whether the guest shut itself down and is to stay down.
    pub completed: bool,
    /// What the status says.
    pub reported: Option<Reported>,
    /// Since when this operator has had no information about the virtual machine.
    pub unknown_since: Option<Moment>,
    /// When the power button was last pressed.
    pub power_button: Option<Moment>,
    /// When each disk's import was last begun.
    pub imports_begun: BTreeMap<DiskId, Moment>,
    /// Whether the API server has said that the namespace is being deleted.
    pub namespace_ending: bool,
    /// The attempt that a source was last asked to begin, and its process, which said yes.
    pub move_begun: Option<(AttemptId, u32)>,
    /// The attempt that a node last refused to begin, when, and why.
    pub move_rejected: Option<(AttemptId, Moment, String)>,
    /// The attempt whose target could not take the guest at the last look, and since when.
    pub target_lost: Option<(AttemptId, Moment)>,
    /// Where an incoming VM process said it listens.
    pub listening: Option<(AttemptId, SocketAddr)>,
    /// Why the last takeover that was asked for was refused.
    pub takeover_refusal: Option<Refusal>,
    /// The last thing that went wrong, as a reason and a message.
    pub error: Option<(&'static str, String)>,
}
