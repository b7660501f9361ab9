//! Every action that the operator may take for a virtual machine, and the status that it reports.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use bascule_crds::{MigrationMode, MigrationPhase, Phase};
use bascule_ipc::vm::{MigrationLimits, MigrationStatus};
use bascule_types::{AttemptId, Change, DiskId, Epoch, FenceProof, Owner};

use crate::{FailedImports, ImageSource, Moment};

/// One action. All are idempotent.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Action {
    /// Add the finalizer to the VirtualMachine.
    AddFinalizer,
    /// Remove the finalizer from the VirtualMachine.
    RemoveFinalizer,
    /// Create a reservation pod. One of that name that exists already is as good.
    CreateReservation {
        name: String,
        /// What it is there for.
        purpose: Purpose,
        /// The only node that it may land on, cordoned or not.
        pin: Option<String>,
        /// Nodes that it may not land on.
        avoid: Vec<String>,
    },
    /// Delete a reservation pod.
    DeleteReservation {
        name: String,
        /// Its UID: a newer one of that name stays.
        uid: String,
        /// Whether not to wait for a kubelet that does not answer.
        force: bool,
    },
    /// The virtual machine runs where this pod is: it is no longer a migration's.
    PromoteReservation {
        name: String,
        /// Its UID.
        uid: String,
    },
    /// Bring a reservation pod's copies of the virtual machine's labels and annotations up to date.
    UpdateReservation {
        name: String,
        /// Its UID.
        uid: String,
    },
    /// End a reservation pod's hold process.
    EndReservation {
        node: String,
        /// The pod's UID.
        pod_uid: String,
    },
    /// Create a migration on behalf of a drain.
    CreateMigration {
        name: String,
        /// How to move.
        mode: MigrationMode,
    },
    /// Write a migration's status.
    ReportMigration {
        name: String,
        /// What to write.
        update: MigrationUpdate,
    },
    /// Open a Failover record.
    CreateFailover {
        name: String,
        /// The node that stopped responding.
        node: String,
        /// Its slot and generation.
        owner: Owner,
        epoch: Epoch,
    },
    /// Write a Failover's status.
    ReportFailover {
        name: String,
        /// What to write.
        update: FailoverUpdate,
    },
    /// Ask for a metadata change through a node.
    Change { via: String, change: Change },
    /// Fill a disk.
    Import {
        node: String,
        /// Its slot and generation, which own the row.
        owner: Owner,
        /// The row's epoch.
        epoch: Epoch,
        disk: DiskId,
        /// The number of the attempt, from 1.
        attempt: u32,
        /// Where its contents come from.
        source: ImageSource,
        /// The path of the field that says so, for messages.
        field: String,
    },
    /// End the import of a disk, or forget that it failed.
    CancelImport { node: String, disk: DiskId },
    /// Start the guest.
    StartVm {
        node: String,
        /// Its slot and generation, which own the row.
        owner: Owner,
        /// The row's epoch.
        epoch: Epoch,
        /// Restore it from its saved state.
        restore: bool,
    },
    /// Build an incoming VM.
    PrepareIncoming {
        node: String,
        attempt: AttemptId,
        /// The node's slot and generation.
        owner: Owner,
        /// The epoch of the source.
        epoch: Epoch,
    },
    /// Move the guest live.
    MigrateLive {
        node: String,
        /// Its process.
        pid: u32,
        attempt: AttemptId,
        /// Where the destination listens.
        peer: SocketAddr,
        /// The slot and generation that the ownership is transferred to.
        to: Owner,
        limits: MigrationLimits,
    },
    /// Save the guest to the volume and hand its row over.
    MigrateQuick {
        node: String,
        /// Its process.
        pid: u32,
        attempt: AttemptId,
        /// The slot and generation that the ownership is transferred to.
        to: Owner,
    },
    /// Cancel a migration.
    CancelMigration { node: String, attempt: AttemptId },
    /// Press the power button.
    PowerButton { node: String },
    /// Force the guest off.
    StopVm { node: String },
    /// Have a paused guest run on, with the errors of this disk.
    ReportDiskErrors { node: String, disk: String },
    /// Remove a VM process that has ended or is not needed any more.
    CollectVm { node: String, pid: u32 },
    /// Record a Kubernetes event on the VirtualMachine.
    Event {
        /// The reason, one of the names.
        reason: &'static str,
        /// What happened.
        message: String,
        /// Type Warning instead of Normal.
        warning: bool,
    },
}

/// What a reservation pod is there for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// The guest runs there, or will.
    Current,
    /// The migration of this name goes there.
    Migration(String),
}

/// What a migration's status should say. Timestamps follow from the phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationUpdate {
    /// The phase to write.
    pub phase: MigrationPhase,
    /// The node that it leaves.
    pub source: Option<String>,
    /// The node that it goes to.
    pub target: Option<String>,
    /// The epoch that it began in.
    pub source_epoch: Option<Epoch>,
    /// The reason, one of the names.
    pub reason: &'static str,
    /// The message, for users.
    pub message: String,
    /// The figures of the copy, as the source reports them.
    pub progress: Option<MigrationStatus>,
}

impl MigrationUpdate {
    /// Without nodes, epoch and progress.
    #[must_use]
    pub fn new(phase: MigrationPhase, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            phase,
            source: None,
            target: None,
            source_epoch: None,
            reason,
            message: message.into(),
            progress: None,
        }
    }

    /// Sets the node that the guest leaves.
    #[must_use]
    pub fn with_source(mut self, source: Option<String>) -> Self {
        self.source = source;
        self
    }

    /// Sets the node that the guest goes to.
    #[must_use]
    pub fn with_target(mut self, target: Option<String>) -> Self {
        self.target = target;
        self
    }

    /// Sets the epoch that the migration began in.
    #[must_use]
    pub fn with_source_epoch(mut self, epoch: Option<Epoch>) -> Self {
        self.source_epoch = epoch;
        self
    }

    /// Sets the figures of the copy.
    #[must_use]
    pub fn with_progress(mut self, progress: Option<MigrationStatus>) -> Self {
        self.progress = progress;
        self
    }
}

/// What a Failover's status should say. Timestamps follow from the stage.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum FailoverUpdate {
    /// Waiting for a proof.
    Suspected {
        /// What is missing.
        message: String,
    },
    /// The row is with a new owner.
    TakenOver {
        /// Where the guest is being started.
        target: String,
        epoch: Epoch,
        /// Why that was safe.
        proof: Option<FenceProof>,
    },
    /// The guest runs again.
    Succeeded {
        /// Where.
        target: String,
        epoch: Epoch,
        /// Why that was safe.
        proof: Option<FenceProof>,
    },
    /// Nothing was taken.
    Withdrawn {
        /// Why.
        message: String,
    },
}

/// The actions and the status that follow from one observation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Executed in this order; a failure skips the rest, and the next plan continues.
    pub actions: Vec<Action>,
    /// The status to write.
    pub report: VmReport,
    /// When to plan again if no watch or report triggers it earlier.
    pub requeue: Duration,
}

/// A VirtualMachine's status.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct VmReport {
    /// Nothing has been known for less than 30 s: the status stays as it is, and the fields below are
    /// not written.
    pub keep: bool,
    /// Since when nothing has been known; input of the next plan.
    pub unknown_since: Option<Moment>,
    /// The attempt whose target cannot take the guest, and since when. Not part of any status.
    pub target_lost: Option<(AttemptId, Moment)>,
    /// For display; programs read the conditions.
    pub phase: Phase,
    pub node: Option<String>,
    /// The Ready condition, which sums the others up.
    pub ready: Condition,
    /// The Protected condition.
    pub protected: Condition,
    /// The Imported condition.
    pub imported: Condition,
    /// Whether the running guest differs from the spec; none when unknown.
    pub restart_required: Option<bool>,
    /// The name of the migration under way.
    pub migration: Option<String>,
    /// When the guest was first asked to shut down.
    pub stopping_since: Option<Moment>,
    /// Whether the guest shut itself down and, under run policy OnFailure, stays down.
    pub completed: bool,
    /// Restarts within the restart budget's window.
    pub restarts: Vec<Moment>,
    /// The panics of the guest's kernel since the guest was started.
    pub panics: u32,
    /// How many of them are news.
    pub new_panics: u32,
    /// Why the guest last ended, if that was observed.
    pub stop_reason: Option<String>,
    /// The failed attempts to import disks that are not there yet, by the disk's name.
    pub failed_imports: BTreeMap<String, FailedImports>,
}

/// A condition to write; `metav1.Condition` without times and generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// True, false, or not known.
    pub status: Option<bool>,
    /// The reason, one of the names.
    pub reason: &'static str,
    /// The message, for users.
    pub message: String,
}

impl Condition {
    /// `status` is None for Unknown.
    #[must_use]
    pub fn new(status: Option<bool>, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            reason,
            message: message.into(),
        }
    }
}
