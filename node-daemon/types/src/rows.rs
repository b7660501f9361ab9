//! The rows of a volume's metadata: virtual machines, disks, saved states and fences.
//!
//! Only the volume's coordinator writes rows; every attached node reads them.
//! `bascule-volume-format` defines their bytes on the disk (module `metadata_records`).

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{AttemptId, Bytes, DiskId, Epoch, Lba, Owner, Refusal, VmUid};

/// A virtual machine on its home volume: the authoritative record of which node may run it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRow {
    /// The `VirtualMachine` object's UID.
    pub vm: VmUid,
    /// `<namespace>/<name>`, for display.
    pub name: RowName,
    /// The slot and generation that may write the VM's disks; none while the VM is stopped.
    pub owner: Option<Owner>,
    /// The epoch of the present ownership, or of the last one. Rises by one with every new owner.
    pub epoch: Epoch,
    /// The migration whose commit began this epoch; none when a start or a takeover did.
    pub attempt: Option<AttemptId>,
    /// SHA-256 of the spec with which the VM was created.
    pub spec_digest: [u8; 32],
}

/// A virtual disk on the volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRow {
    /// Chosen by the coordinator when the disk is created.
    pub disk: DiskId,
    /// `<namespace>/<disk>`, unique on the volume.
    pub name: RowName,
    /// The VM to which the disk is attached; none for a disk kept after its VM was deleted.
    pub vm: Option<VmUid>,
    /// The size that the guest sees. The extents may be longer.
    pub size: Bytes,
    /// What the disk is used for.
    pub role: DiskRole,
    /// Whether the import is unfinished; the disk cannot be opened or attached then.
    pub importing: bool,
    /// The owner that fills the disk while it is being imported. Another node may take the import
    /// over only after this one was fenced or its node has rebooted.
    #[serde(default)]
    pub importer: Option<Owner>,
    /// The disk's blocks on the volume, in the order of the disk's contents. At most 24 runs.
    pub extents: Vec<ExtentRun>,
}

/// A VM's saved RAM and device state on the volume, for a quick migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedStateRow {
    /// The VM that was saved; a VM has at most one saved state.
    pub vm: VmUid,
    /// The epoch in which the owner saved the VM.
    pub epoch: Epoch,
    /// The blocks that are reserved, in the order of the state's contents. At most 24 runs.
    pub extents: Vec<ExtentRun>,
    /// Length and checksum; none until the owner has written and flushed all of the state.
    pub complete: Option<SavedStateSum>,
}

/// The length and checksum of a complete saved state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedStateSum {
    /// The state's length; a reader reads no further.
    pub length: Bytes,
    /// CRC32C over all `length` bytes, in order.
    pub crc32c: u32,
}

/// A run of consecutive extents on the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtentRun {
    /// The first block, a multiple of the extent size.
    pub start: Lba,
    /// A whole number of extents; not zero.
    pub length: Bytes,
}

/// The record that an owner was fenced: it will not write to this volume again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct FenceRow {
    pub victim: Owner,
    /// The evidence with which the coordinator fenced it.
    pub proof: FenceProof,
}

/// Why it is certain that an owner will not write again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FenceProof {
    /// The coordinator saw no new heartbeat for the safe time, under a hardware watchdog.
    SafeTimeElapsed {
        /// Time without a new heartbeat, by the coordinator's own reads, in milliseconds.
        watched_ms: u64,
        /// The safe time by the victim's own heartbeat record, in milliseconds.
        required_ms: u64,
    },
    /// An administrator confirmed that the node is down.
    Administrator(AdminConfirmation),
    /// The node itself reported that it has rebooted since.
    Rebooted,
}

/// Where a manual fencing confirmation came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum AdminConfirmation {
    /// `bascule-node volume confirm-fenced`, or the annotation that the operator reads.
    Confirmed,
    /// The `node.kubernetes.io/out-of-service` taint.
    OutOfServiceTaint,
}

/// What a disk is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DiskRole {
    /// A virtio-blk disk of the guest.
    Data,
    /// The kernel image for direct kernel boot; not visible to the guest.
    Kernel,
    /// The initial RAM disk for direct kernel boot; not visible to the guest.
    Initrd,
}

/// `<namespace>/<name>`: 1 to [`RowName::BYTES_MAX`] bytes of visible ASCII.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RowName(String);

impl RowName {
    /// The room for a name in a 512-byte disk row beside 24 extent runs. A Kubernetes namespace
    /// has at most 63 bytes; names that would need more than the rest are refused.
    pub const BYTES_MAX: usize = 191;

    /// Checks length and characters.
    ///
    /// # Errors
    /// [`Refusal::BadName`] for an empty or too long text, or one with other than visible ASCII.
    pub fn new(text: impl Into<String>) -> Result<Self, Refusal> {
        let text = text.into();
        let fits = !text.is_empty() && text.len() <= Self::BYTES_MAX;
        if fits && text.bytes().all(|b| b.is_ascii_graphic()) {
            Ok(Self(text))
        } else {
            Err(Refusal::BadName)
        }
    }

    /// The name as `<namespace>/<name>`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The part before the first `/`; empty if there is none.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.0
            .split_once('/')
            .map_or("", |(namespace, _)| namespace)
    }
}

impl TryFrom<String> for RowName {
    type Error = Refusal;
    fn try_from(text: String) -> Result<Self, Refusal> {
        Self::new(text)
    }
}

impl From<RowName> for String {
    fn from(name: RowName) -> Self {
        name.0
    }
}

impl fmt::Display for RowName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RowName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}
