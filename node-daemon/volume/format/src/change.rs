//! What can be asked of a volume's metadata, and what the coordinator answers.
//!
//! A [`Change`] is the one vocabulary for metadata: a local process asks its `bascule-volume` for
//! one, that forwards it to the coordinator, the coordinator decides it against the
//! metadata, journals it and answers with an [`Answer`] or a [`Refusal`]. Every change is
//! idempotent: asked twice, it gives the same answer and has one effect.

use std::fmt;

use bascule_types::{AttemptId, Bytes, DiskId, Epoch, Lba, NodeUid, Owner, SlotId, VmUid};
use serde::{Deserialize, Serialize};

/// One request to alter the metadata.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// Give a node a heartbeat slot, or name the one it has. Asked by the operator or the command
    /// line; the coordinator journals the row before the node may write its first heartbeat.
    RegisterNode {
        /// The node.
        node: NodeUid,
    },
    /// Raise a slot's generation: at node boot, or after the lease has lapsed. The rows that
    /// `from` still owns (nobody fenced it) go over to the new generation in the same epoch,
    /// because the same processes go on; a fenced `from` takes nothing along.
    Rejoin {
        /// The node that holds the slot.
        node: NodeUid,
        /// Its last generation, as its own slot records show it.
        from: Owner,
        /// Whether the node has booted since: then no process of `from` exists any more, and its
        /// rows are released instead of kept.
        rebooted: bool,
    },
    /// Create a VM's row, without owner, in epoch 0. Idempotent on the UID.
    CreateVm {
        /// The VM.
        vm: VmUid,
        /// `<namespace>/<name>`, for people.
        name: RowName,
        /// SHA-256 of the spec that was asked for.
        spec_digest: [u8; 32],
    },
    /// Remove a VM's row. Refused while it has an owner. Its disks become kept disks unless they
    /// are deleted first.
    DeleteVm {
        /// The VM.
        vm: VmUid,
    },
    /// Allocate a disk. Idempotent on (VM, name). A disk that is being imported cannot be opened
    /// until [`Change::FinishImport`].
    CreateDisk {
        /// The VM that it belongs to.
        vm: VmUid,
        /// `<namespace>/<disk>`, unique on the volume.
        name: RowName,
        /// Its size; rounded up to whole extents.
        size: Bytes,
        /// What lies on it.
        role: DiskRole,
        /// Whether the asker fills it from an image. If not, the asker's `bascule-volume` zeroes
        /// it before it answers: to the coordinator every new disk is `importing`.
        importing: bool,
    },
    /// The import is complete, flushed and its hash checked: from now on the disk can be opened.
    FinishImport {
        /// The disk.
        disk: DiskId,
        /// The image's length. A kernel's or initrd's row becomes that long, and gives the space
        /// behind it back; another disk keeps its size.
        #[serde(default)]
        length: Option<Bytes>,
    },
    /// Give a kept disk of the same namespace to a VM.
    AttachDisk {
        /// The disk's name, `<namespace>/<disk>`.
        name: RowName,
        /// The VM.
        vm: VmUid,
    },
    /// Delete a disk. Refused while its VM has an owner.
    DeleteDisk {
        /// The disk.
        disk: DiskId,
    },
    /// Own a row that has no owner: epoch + 1. Asked by the node that is about to start the VM.
    Acquire {
        /// The VM.
        vm: VmUid,
        /// The epoch that the asker last saw; a stale asker is refused.
        expected_epoch: Epoch,
        /// The new owner: the asking slot, whose lease must be valid.
        to: Owner,
    },
    /// Give a row up: the gate is closed **and** every submitted write has completed. The epoch
    /// stays; the next owner raises it.
    Release {
        /// The VM.
        vm: VmUid,
        /// Who releases.
        from: Owner,
        /// Its epoch.
        epoch: Epoch,
    },
    /// The commit point of a migration: ownership goes from source to destination, epoch + 1.
    /// Only the source asks. Idempotent on `attempt`.
    Transfer {
        /// The VM.
        vm: VmUid,
        /// The source, which must own the row.
        from: Owner,
        /// In this epoch.
        epoch: Epoch,
        /// The destination, whose lease must be valid.
        to: Owner,
        /// The attempt.
        attempt: AttemptId,
    },
    /// Take a row from a silent owner: epoch + 1. Granted only when `from` is fenced, by a proof
    /// that the coordinator verified by its own reads or that an administrator gave.
    TakeOver {
        /// The VM.
        vm: VmUid,
        /// The owner that is thought dead.
        from: Owner,
        /// The epoch it owned the row in.
        epoch: Epoch,
        /// The new owner, whose lease must be valid.
        to: Owner,
    },
    /// An administrator's word that nothing of `victim` runs any more. Bound to one generation.
    ConfirmFenced {
        /// Who is dead.
        victim: Owner,
        /// Where the word comes from.
        word: AdministratorsWord,
    },
    /// Reserve space for a saved VM (quick migration), before the guest is paused.
    ReserveSavedState {
        /// The VM.
        vm: VmUid,
        /// Its owner.
        from: Owner,
        /// Room for RAM and device state.
        size: Bytes,
    },
    /// The saved state is complete and flushed.
    FinishSavedState {
        /// The VM.
        vm: VmUid,
        /// Its owner.
        from: Owner,
        /// How many bytes were written.
        length: Bytes,
        /// CRC32C over them all, in order.
        crc32c: u32,
    },
    /// Free a VM's saved state, after it was restored or given up.
    DropSavedState {
        /// The VM.
        vm: VmUid,
        /// Its owner.
        from: Owner,
    },
}

/// What the coordinator answers to a granted change, after it is durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The slot and generation that the node now has, and which rows it kept.
    Slot {
        /// Slot and generation.
        owner: Owner,
        /// Rows that went over from the earlier generation.
        kept: Vec<VmUid>,
    },
    /// The row as it is now.
    Row(VmRow),
    /// The disk as it is now.
    Disk(DiskRow),
    /// Where the saved state lies.
    SavedState(SavedStateRow),
    /// It is gone, or was gone already.
    Gone,
    /// The victim is fenced.
    Fenced(FenceRow),
}

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
    Administrator(AdministratorsWord),
    /// The node booted again and said so itself.
    Rebooted,
}

/// Where an administrator's word came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum AdministratorsWord {
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

/// Why the coordinator refused a change. Nothing was altered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The name is empty, too long, or has other than visible ASCII.
    #[error("the name must be 1 to 191 visible ASCII characters")]
    BadName,
    /// No such VM on this volume.
    #[error("this volume has no such VM")]
    NoSuchVm,
    /// No such disk on this volume.
    #[error("this volume has no such disk")]
    NoSuchDisk,
    /// The VM or the slot has no saved state.
    #[error("this VM has no saved state on the volume")]
    NoSavedState,
    /// The row is owned by somebody else than the asker said.
    #[error("the VM is owned by {owner} in epoch {epoch}")]
    OwnedBy {
        /// The owner.
        owner: Owner,
        /// The epoch.
        epoch: Epoch,
    },
    /// The row has no owner, in a later epoch than the asker knew.
    #[error("the VM has no owner; its epoch is {epoch}")]
    EpochIs {
        /// The epoch.
        epoch: Epoch,
    },
    /// Only the owner's own node may ask this.
    #[error("only the node of {owner} may ask this")]
    OwnersNodeOnly {
        /// The owner.
        owner: Owner,
    },
    /// The slot belongs to another node, or is in another generation.
    #[error("{owner} is not the present holder of its slot")]
    StaleOwner {
        /// The one that asked.
        owner: Owner,
    },
    /// The owner was fenced: it must stop for good.
    #[error("{owner} was fenced")]
    Fenced {
        /// The fenced one.
        owner: Owner,
    },
    /// There is no proof yet that the victim is fenced.
    #[error("no proof yet that {victim} will not write again: {missing}")]
    NotFenced {
        /// The one that is thought dead.
        victim: Owner,
        /// What is missing.
        missing: MissingProof,
    },
    /// The new owner's own lease is not valid, as the coordinator sees it.
    #[error("the lease of {owner} is not valid")]
    LeaseInvalid {
        /// The new owner.
        owner: Owner,
    },
    /// The disk's name is taken by another VM's or a kept disk.
    #[error("a disk of that name exists on the volume and belongs to somebody else")]
    NameTaken,
    /// The disk exists with another size or role.
    #[error("the disk exists with another size or role")]
    DiskDiffers,
    /// The disk's import has not finished.
    #[error("the disk's import has not finished")]
    Importing,
    /// Another node is filling the disk.
    #[error("the disk is being imported by {owner}")]
    ImportedElsewhere {
        /// The importer.
        owner: Owner,
    },
    /// A disk of another namespace.
    #[error("the disk belongs to another namespace")]
    OtherNamespace,
    /// Not enough free space.
    #[error("the volume has {free} free; {needed} are needed")]
    Full {
        /// Free.
        free: Bytes,
        /// Needed.
        needed: Bytes,
    },
    /// The format's tables are full.
    #[error("the volume has no room for another {what:?}")]
    TableFull {
        /// Which table.
        what: Table,
    },
    /// Every heartbeat slot is taken.
    #[error("slot {slot} is taken by another node")]
    SlotTaken {
        /// The slot.
        slot: SlotId,
    },
    /// The volume's fencing does not allow what was asked.
    #[error("the volume's fencing mode does not allow this")]
    NotAllowed,
}

/// Which table of the metadata is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Table {
    /// All rows together: what a checkpoint has room for.
    Rows,
    /// Heartbeat slots.
    Slots,
    /// VM rows.
    Vms,
    /// Disk rows.
    Disks,
    /// Fence rows.
    Fences,
    /// Extent runs of one disk: the free space is too fragmented.
    Extents,
}

/// What is missing for a fence proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
pub enum MissingProof {
    /// Its heartbeat was seen a moment ago.
    #[error("its heartbeat is alive")]
    Alive,
    /// The safe time has not passed.
    #[error("silent for {watched_ms} ms of the {required_ms} ms required")]
    SafeTime {
        /// Watched so far, in milliseconds.
        watched_ms: u64,
        /// Required, in milliseconds.
        required_ms: u64,
    },
    /// Fencing is LeaseOnly: only an administrator's word counts.
    #[error("fencing LeaseOnly needs an administrator's word")]
    AdministratorsWord,
    /// The victim had no hardware watchdog.
    #[error("it ran without a hardware watchdog, so only an administrator's word counts")]
    NoWatchdog,
}
