//! What a node reports.

use bascule_ipc::vm::VmStatus;
use bascule_ipc::volume::VolumeStatus;
use bascule_types::{Bytes, DiskId, NodeUid};
use serde::{Deserialize, Serialize};

/// Everything the operator learns from one node. Each report replaces the one before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReport {
    /// The node.
    pub node: NodeUid,
    /// Its name.
    pub name: String,
    /// The release of `bascule-node`.
    pub release: String,
    /// The kernel's boot id: another one is another boot.
    pub boot_id: String,
    /// Why no VM can run here; none when KVM works.
    pub kvm_error: Option<String>,
    /// The volumes that were attached here.
    pub volumes: Vec<VolumeReport>,
    /// The VM processes.
    pub vms: Vec<VmReport>,
    /// Imports, finished ones until their disk has left `importing`.
    pub imports: Vec<ImportReport>,
}

/// One attached volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeReport {
    /// The SharedVolume's name.
    pub name: String,
    /// Its state, or why its process gives none.
    pub status: Result<VolumeStatus, String>,
}

/// One VM process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmReport {
    /// `<namespace>/<name>`.
    pub name: String,
    /// The SharedVolume that is its home.
    pub volume: String,
    /// Its status; the last one known when the process does not answer or has ended.
    pub status: VmStatus,
    /// Whether the process exists.
    pub alive: bool,
    /// Resident memory beyond guest RAM.
    pub overhead: Option<Bytes>,
}

/// One import.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportReport {
    /// The SharedVolume's name.
    pub volume: String,
    /// The disk.
    pub disk: DiskId,
    /// Bytes written.
    pub written: Bytes,
    /// Bytes in all, when known.
    pub total: Option<Bytes>,
    /// Where it stands.
    pub state: ImportState,
}

/// Where an import stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImportState {
    /// Going on.
    Running,
    /// Written, flushed, its hash checked.
    Complete {
        /// The contents' true length.
        length: Bytes,
    },
    /// Failed; names the source.
    Failed {
        /// Why.
        message: String,
    },
}
