//! The report that a node streams to the operator: once per second, and after each change.

use bascule_ipc::vm::VmStatus;
use bascule_ipc::volume::VolumeStatus;
use bascule_types::{Bytes, DiskId, NodeUid};
use serde::{Deserialize, Serialize};

/// One node's complete state as the operator sees it. Each report replaces the one before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct NodeReport {
    pub node: NodeUid,
    pub name: String,
    /// The release of `bascule-node`.
    pub release: String,
    /// The kernel's boot id (`/proc/sys/kernel/random/boot_id`), which changes with every boot.
    pub boot_id: String,
    /// Why no VM can run here; none when KVM works.
    pub kvm_error: Option<String>,
    /// The attached volumes.
    pub volumes: Vec<VolumeReport>,
    pub vms: Vec<VmReport>,
    /// The imports; a finished one is listed until its disk's `importing` flag is cleared.
    pub imports: Vec<ImportReport>,
}

/// One attached volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeReport {
    /// The SharedVolume's name.
    pub name: String,
    /// The UID under which the node has its slot there. It differs from the node's own UID when the
    /// Node object was registered anew since the volume was attached. None from an older release.
    #[serde(default)]
    pub node: Option<NodeUid>,
    /// The status that `bascule-volume` gave, or why it gave none.
    pub status: Result<VolumeStatus, String>,
}

/// One VM process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmReport {
    /// `<namespace>/<name>`.
    pub name: String,
    /// The name of the home volume.
    pub volume: String,
    /// The process's status; the last known one when it does not respond or has ended.
    pub status: VmStatus,
    /// Whether the process exists.
    pub alive: bool,
    /// Resident memory beyond guest RAM.
    pub overhead: Option<Bytes>,
}

/// One import.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct ImportReport {
    /// The SharedVolume's name.
    pub volume: String,
    pub disk: DiskId,
    /// The number of the attempt, as it was requested.
    #[serde(default)]
    pub attempt: u32,
    /// Bytes of the image, as its source has it, that have come.
    #[serde(default)]
    pub downloaded: Bytes,
    /// Bytes of the disk, from its beginning, that are filled.
    pub written: Bytes,
    /// The total number of bytes, when the source announces it.
    pub total: Option<Bytes>,
    /// Whether the import runs, is complete or has failed.
    pub state: ImportState,
}

impl NodeReport {
    /// The UID under which the node has its slot on a volume.
    #[must_use]
    pub fn uid_on(&self, volume: &str) -> NodeUid {
        let mut attached = self.volumes.iter();
        let attached = attached.find(|attached| attached.name == volume);
        attached
            .and_then(|attached| attached.node)
            .unwrap_or(self.node)
    }
}

/// The state of an import.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImportState {
    /// The import process runs.
    Running,
    /// The contents are written and flushed, and their hash is verified.
    Complete {
        /// The contents' true length.
        length: Bytes,
    },
    /// The import failed and can be requested again.
    Failed {
        /// The cause; names the source.
        message: String,
        /// Whether the same source fails again: its format, its length or its CPU is wrong.
        #[serde(default)]
        is_final: bool,
    },
}
