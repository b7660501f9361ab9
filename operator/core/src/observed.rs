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
use crate::{Fact, FailedImports, Moment, SpecDigest};

/// The observed inputs of a plan.
#[derive(Clone, Debug, Default)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Observed {
    pub volume: Fact<VolumeView>,
    /// Nodes on which `bascule-node` runs or has run, by name.
    pub nodes: BTreeMap<String, NodeView>,
    /// The VM's row on its home volume.
    pub row: Fact<RowView>,
    /// The owner that the last response of the volume named, and the epoch, however old that response is: good
    /// for reports, never for a decision about who may write.
    pub last_owner: Option<(Owner, Epoch)>,
    /// Those that the operator has made.
    pub pods: Fact<Vec<Pod>>,
    /// Pods that claim to be reservations of this VM, and are none that the operator knows to have made.
    pub foreign_pods: Vec<ForeignPod>,
    /// Including finished ones.
    pub migrations: Fact<Vec<Migration>>,
    /// Including closed ones.
    pub failovers: Fact<Vec<FailoverView>>,
    /// As last reported by each node.
    pub processes: Vec<Process>,
    /// Of the VM's disks.
    pub imports: Vec<ImportView>,
    pub memory: PlannerMemory,
}

#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct VolumeView {
    /// How nodes that stopped responding are fenced.
    pub fencing: FencingMode,
    /// Whether the backing is a file instead of a block device.
    pub file: bool,
    /// Whether the volume id is known. Before that, no VM can have a row on it.
    pub identified: bool,
    /// The heartbeat of every slot, as seen by other nodes.
    pub peers: Vec<Peer>,
}

/// A slot's heartbeat, as another node sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Peer {
    pub owner: Owner,
    pub node: NodeUid,
    /// Whether another node saw the heartbeat change within the lease time.
    pub alive: bool,
}

/// A node, as API server and daemon report it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct NodeView {
    pub uid: Option<NodeUid>,
    pub cordoned: bool,
    /// The Node's Ready condition. Reported, never acted on: guests do not need a kubelet.
    pub kubelet_ready: Fact<bool>,
    pub stream: Stream,
    /// Why `/dev/kvm` cannot be used; none when it can.
    pub kvm_error: Option<String>,
    /// How the node reaches the VM's volume. Absent: not attached there. Unknown: the volume process there
    /// has not answered.
    pub access: Fact<Access>,
}

/// The state of the report stream from a node's daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Stream {
    /// No connection was tried yet.
    #[default]
    Unknown,
    /// Reports arrive.
    Up,
    /// No report has arrived for longer than the stream's timeout.
    Down { since: Moment },
}

/// How a node reaches a volume, as its own volume process reports.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Access {
    pub path: PathState,
    /// Why the path is not direct; for users.
    pub reason: Option<String>,
    pub owner: Option<Owner>,
    /// What resets this node when it cannot renew its lease.
    pub watchdog: WatchdogKind,
    pub coordinator: bool,
}

/// The VM's row and the rows that refer to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct RowView {
    /// None while the VM is stopped.
    pub owner: Option<Owner>,
    pub epoch: Epoch,
    /// The VM's disks, and the kept disks of the volume.
    pub disks: Vec<DiskRow>,
    /// Saved by a quick migration, or left incomplete by one that failed.
    pub saved: Option<SavedView>,
    pub fences: Vec<FenceRow>,
}

/// A saved state on the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedView {
    /// The epoch in which the state was saved.
    pub epoch: Epoch,
    /// Whether the state was written and flushed completely.
    pub complete: bool,
}

impl SavedView {
    /// Whether a guest may be restored from this state in `epoch`: only in the next epoch, because
    /// a later owner may have written to the disks since.
    #[must_use]
    pub fn is_restorable(self, epoch: Epoch) -> bool {
        self.complete && self.epoch.next() == epoch
    }
}

/// A reservation pod.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Pod {
    pub uid: String,
    pub name: String,
    pub purpose: Purpose,
    pub phase: PodPhase,
    pub node: Option<String>,
    /// When its deletion was requested, or when the kubelet evicted it.
    pub leaving_since: Option<Moment>,
    /// Whether the pod has a deletion timestamp.
    pub deleting: bool,
    /// The scheduler's message when it finds no node.
    pub unschedulable: Option<String>,
    /// The nodes excluded by the pod's affinity.
    pub avoid: Vec<String>,
    /// The digest of the spec that the pod reserves for.
    pub digest: SpecDigest,
    /// Whether its copies of the VM's labels and annotations are up to date.
    pub copies_current: bool,
}

/// A pod with the labels and the owner of a reservation that the operator has no record of: a tenant made it, or
/// an operator that ended before it could write the record.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct ForeignPod {
    pub uid: String,
    pub name: String,
    pub created: Moment,
    /// Whether the pod has a deletion timestamp.
    pub deleting: bool,
}

/// The operator's record of a reservation pod that it has made. What it says is believed, and not what the pod
/// says of itself: whoever may write pods in the namespace may write anything there.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct ReservationRecord {
    pub uid: String,
    pub name: String,
    pub purpose: Purpose,
    /// The digest of the spec that the pod reserves for.
    pub digest: SpecDigest,
    /// When this operator made it; zero in a record that another one wrote.
    pub made: Moment,
}

/// A pod's phase, with evictions told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum PodPhase {
    Pending,
    Running,
    /// Ended by the kubelet's eviction: the VM must leave the node.
    Evicted,
    /// Ended in any other way.
    Failed,
}

/// A VirtualMachineMigration.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Migration {
    pub name: String,
    /// The object's UID, which identifies the attempt on the volume and on the wire.
    pub attempt: AttemptId,
    pub created: Moment,
    pub mode: MigrationMode,
    /// The requested target node, if any.
    pub target: Option<String>,
    /// Maximum blackout; overrides the VM's.
    pub downtime: Option<std::time::Duration>,
    /// Time limit of the attempt; overrides the VM's.
    pub timeout: Option<std::time::Duration>,
    /// Bandwidth limit in bytes per second; overrides the VM's.
    pub bandwidth: Option<u64>,
    /// Whether a user asked to cancel it.
    pub cancel: bool,
    /// Whether the operator created it for a drain.
    pub drain: bool,
    pub phase: MigrationPhase,
    pub started: Option<Moment>,
    pub source: Option<String>,
    /// The epoch in which the source owned the VM when the attempt began.
    pub source_epoch: Option<Epoch>,
    /// The reason of its Complete condition.
    pub reason: Option<String>,
}

/// A Failover record.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct FailoverView {
    pub name: String,
    /// The lost node.
    pub node: String,
    pub owner: Owner,
    /// The epoch in which the lost node owned the VM.
    pub epoch: Epoch,
    /// Whether the record says that the ownership was taken over.
    pub taken_over: bool,
    /// Whether its phase is final.
    pub closed: bool,
}

/// A VM process, as its node reported it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Process {
    pub node: String,
    /// Whether the process exists.
    pub alive: bool,
    /// The last known status.
    pub status: VmStatus,
}

/// The import of one disk's image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct ImportView {
    /// The importing node.
    pub node: String,
    pub disk: DiskId,
    /// The number of the attempt, as it was requested.
    pub attempt: u32,
    /// Bytes of the image, as its source has it.
    pub downloaded: Bytes,
    /// Bytes of the disk, from its beginning.
    pub written: Bytes,
    pub phase: ImportPhase,
}

/// Where an import stands.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum ImportPhase {
    Running,
    /// Written, flushed, digest verified.
    Complete {
        length: Bytes,
    },
    Failed {
        /// For users.
        message: String,
        /// Whether the same source fails again.
        is_final: bool,
    },
}

/// The part of the VM's status that the planner reads back.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Reported {
    pub phase: Phase,
    pub node: Option<String>,
}

/// A reservation pod that the API server refused to create.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct ReservationRefusal {
    pub purpose: Purpose,
    /// When it was last requested.
    pub at: Moment,
    /// The reason for conditions.
    pub reason: &'static str,
    /// The API server's message, which names a quota.
    pub message: String,
}

/// What the planner remembers between plans, from the status or from this operator's memory. All of it
/// may be lost with a restart; an action is then repeated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct PlannerMemory {
    /// Restarts within the restart budget's window.
    pub restarts: Vec<Moment>,
    /// The panics of the guest's kernel that are reported already; none before this operator has reported any.
    pub panics: Option<u32>,
    /// When the guest was first asked to shut down.
    pub stopping_since: Option<Moment>,
    /// Whether the guest shut itself down and, under run policy OnFailure, stays down.
    pub completed: bool,
    pub reported: Option<Reported>,
    /// Since when this operator has had no information about the VM.
    pub unknown_since: Option<Moment>,
    pub power_button: Option<Moment>,
    /// The failed attempts to import disks, by the disk's name.
    pub failed_imports: BTreeMap<String, FailedImports>,
    /// Whether the API server refused a creation because the namespace is being deleted.
    pub namespace_ending: bool,
    /// The attempt that the source accepted last, and the source's process id.
    pub move_begun: Option<(AttemptId, u32)>,
    /// The attempt that a node refused last, when, and its reason.
    pub move_rejected: Option<(AttemptId, Moment, String)>,
    /// The attempt whose target could not take the guest when last observed, and since when.
    pub target_lost: Option<(AttemptId, Moment)>,
    /// The address on which the incoming VM process listens.
    pub listening: Option<(AttemptId, SocketAddr)>,
    /// The coordinator's refusal of the last takeover request.
    pub takeover_refusal: Option<Refusal>,
    /// The reservation pods that the operator has made.
    pub reservations: Vec<ReservationRecord>,
    /// The reservation pod whose hold process was ended last, and when.
    pub hold_ended: Option<(String, Moment)>,
    /// The last refused reservation pod, until one is created.
    pub reservation_refusal: Option<ReservationRefusal>,
    /// The reason and message of the last failed action.
    pub error: Option<(&'static str, String)>,
}
