//! The requests that alter a volume's metadata, and the coordinator's answers.
//!
//! A node process sends a [`Change`] to its `bascule-volume`, which forwards it to the coordinator.
//! The coordinator decides it against the metadata, journals it, and answers with an [`Answer`] or a
//! [`Refusal`](crate::Refusal). Every change is idempotent: a repeated request gets the same answer
//! and has one effect.

use serde::{Deserialize, Serialize};

use crate::{
    AdminConfirmation, AttemptId, Bytes, DiskId, DiskRole, DiskRow, Epoch, FenceRow, NodeUid,
    Owner, RowName, SavedStateRow, VmRow, VmUid,
};

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
    /// An administrator's fencing confirmation that nothing of `victim` runs any more. Bound to one generation.
    ConfirmFenced {
        /// Who is dead.
        victim: Owner,
        /// Where the word comes from.
        confirmation: AdminConfirmation,
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
