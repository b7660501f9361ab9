//! The rows of a volume's metadata: virtual machines, disks, saved states and fences.
//!
//! `bascule-volume-format` defines how each row lies on the disk; the coordinator is their only
//! writer.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{AttemptId, Bytes, DiskId, Epoch, Lba, Owner, Refusal, VmUid};

/// One virtual machine on its home volume. This row answers "who may run this VM".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRow {
    /// The VM.
    pub vm: VmUid,
    /// `<namespace>/<name>`.
    pub name: RowName,
    /// Who may write its disks; nobody when it is stopped.
    pub owner: Option<Owner>,
    /// The tenure.
    pub epoch: Epoch,
    /// The migration that made this tenure, if one did.
    pub attempt: Option<AttemptId>,
    /// SHA-256 of the spec.
    pub spec_digest: [u8; 32],
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRow {
    /// The disk.
    pub disk: DiskId,
    /// `<namespace>/<disk>`.
    pub name: RowName,
    /// The VM that it belongs to; none for a kept disk.
    pub vm: Option<VmUid>,
    /// The size that the guest sees.
    pub size: Bytes,
    /// What lies on it.
    pub role: DiskRole,
    /// Half-imported: not attachable.
    pub importing: bool,
    /// Who fills it while it is being imported. Nobody else may, until that one is fenced, has
    /// booted again or has given it up.
    #[serde(default)]
    pub importer: Option<Owner>,
    /// Where its blocks are, in the order of its contents.
    pub extents: Vec<ExtentRun>,
}

/// A saved VM on the volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedStateRow {
    /// The VM.
    pub vm: VmUid,
    /// The tenure that saved it.
    pub epoch: Epoch,
    /// Where it lies.
    pub extents: Vec<ExtentRun>,
    /// Bytes written; none until it is complete.
    pub complete: Option<SavedStateSum>,
}

/// The length and checksum of a complete saved state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedStateSum {
    /// Bytes written.
    pub length: Bytes,
    /// CRC32C over them all.
    pub crc32c: u32,
}

/// A run of consecutive blocks on the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtentRun {
    /// The first block.
    pub start: Lba,
    /// How long the run is; a whole number of extents.
    pub length: Bytes,
}

/// The record that a slot's generation will never write again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceRow {
    /// Who.
    pub victim: Owner,
    /// Why that is certain.
    pub proof: FenceProof,
}

/// Why it is certain that an owner will not write again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FenceProof {
    /// The coordinator saw no new heartbeat for the safe time, under a hardware watchdog.
    SafeTimeElapsed {
        /// How long the coordinator watched, in milliseconds.
        watched_ms: u64,
        /// The safe time of the victim's own record, in milliseconds.
        required_ms: u64,
    },
    /// An administrator said so.
    Administrator(AdminConfirmation),
    /// The node booted again and said so itself.
    Rebooted,
}

/// Where an administrator's fencing confirmation came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum AdminConfirmation {
    /// `bascule-node volume confirm-fenced` or the operator's annotation.
    Confirmed,
    /// The `node.kubernetes.io/out-of-service` taint.
    OutOfServiceTaint,
}

/// What lies on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DiskRole {
    /// A disk that the guest sees.
    Data,
    /// The kernel image that the VM boots.
    Kernel,
    /// Its initial RAM disk.
    Initrd,
}

/// A name of at most [`RowName::BYTES_MAX`] bytes of visible ASCII: `<namespace>/<name>`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RowName(String);

impl RowName {
    /// A Kubernetes namespace (63) and a name (253, cut to what a disk's row has room for).
    pub const BYTES_MAX: usize = 191;

    /// The text as a name.
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

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What stands before the first `/`, or nothing.
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
