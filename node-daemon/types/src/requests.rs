//! The requests that alter a volume's metadata, and the coordinator's answers.
//!
//! A process of a node sends a [`Change`] to the node's `bascule-volume`, which forwards it to the
//! volume's coordinator. The coordinator decides the change against the metadata, journals the
//! result, and answers with an [`Answer`] or a [`Refusal`](crate::Refusal). Every change is
//! idempotent: a repeated request has one effect and gets the same answer. "The requester" below is
//! the node whose `bascule-volume` forwards the change.

use serde::{Deserialize, Serialize};

use crate::{
    AdminConfirmation, AttemptId, Bytes, DiskId, DiskRole, DiskRow, Epoch, FenceRow, NodeUid,
    Owner, RowName, SavedStateRow, VmRow, VmUid,
};

/// One request to alter the metadata.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Change {
    /// Assign a heartbeat slot to a node, or return the slot that it has. Requested by the operator
    /// or the command line. The slot's row is journaled before the node may write its first
    /// heartbeat.
    RegisterNode { node: NodeUid },
    /// Raise a slot's generation: at node boot, or after the lease has lapsed. The VMs and imports
    /// of `from` go over to the new generation in the same epoch, because the same processes go on.
    /// If `from` was fenced or the node rebooted, its VMs are released instead.
    Rejoin {
        /// The node that holds the slot.
        node: NodeUid,
        /// The node's last generation, as its own heartbeat records show it.
        from: Owner,
        /// Whether the node has booted since `from`: no process of `from` exists any more.
        rebooted: bool,
    },
    /// Create a VM's row, without owner, in epoch 0. Idempotent on the UID.
    CreateVm {
        vm: VmUid,
        /// `<namespace>/<name>`, for display.
        name: RowName,
        /// SHA-256 of the VM's spec.
        spec_digest: [u8; 32],
    },
    /// Remove a VM's row and its saved state. Refused while the VM has an owner. Its disks become
    /// kept disks unless they are deleted first.
    DeleteVm { vm: VmUid },
    /// Allocate a disk. Idempotent on (VM, name). A disk that is being imported cannot be opened
    /// before [`Change::FinishImport`].
    CreateDisk {
        /// The VM to which the disk is attached.
        vm: VmUid,
        /// `<namespace>/<disk>`, unique on the volume.
        name: RowName,
        /// The size that the guest sees; whole extents are allocated.
        size: Bytes,
        role: DiskRole,
        /// Whether the requester fills the disk from an image. If not, the requester's
        /// `bascule-volume` zeroes it before it answers: to the coordinator every new disk is
        /// `importing`.
        importing: bool,
    },
    /// The import is complete, flushed and its hash checked: the disk can be opened.
    FinishImport {
        disk: DiskId,
        /// The image's length. A kernel or initrd disk is cut to this length and its unused extents
        /// are freed; a data disk keeps its size.
        #[serde(default)]
        length: Option<Bytes>,
    },
    /// Attach a kept disk to a VM of the same namespace.
    AttachDisk {
        /// The disk's name, `<namespace>/<disk>`.
        name: RowName,
        vm: VmUid,
    },
    /// Delete a disk and free its extents. Refused while its VM has an owner.
    DeleteDisk { disk: DiskId },
    /// Become the owner of a VM that has none: epoch + 1. Requested by the node that is about to
    /// start the VM.
    Acquire {
        vm: VmUid,
        /// The epoch that the requester last read; refused if it has changed.
        expected_epoch: Epoch,
        /// The requester's own slot and generation; its lease must be valid.
        to: Owner,
    },
    /// Give up a VM. Request this only when the gate is closed **and** every submitted write has
    /// completed. The epoch stays; the next owner raises it.
    Release {
        vm: VmUid,
        /// The present owner; only its node may request this.
        from: Owner,
        epoch: Epoch,
    },
    /// The commit point of a migration: ownership goes from source to destination, epoch + 1. Only
    /// the source requests it. Idempotent on `attempt`.
    Transfer {
        vm: VmUid,
        /// The source, which must own the VM in `epoch`.
        from: Owner,
        epoch: Epoch,
        /// The destination, whose lease must be valid.
        to: Owner,
        attempt: AttemptId,
    },
    /// Take a VM from a failed owner: epoch + 1. Granted only when `from` is fenced, by a proof
    /// that the coordinator verified by its own reads or that an administrator confirmed.
    TakeOver {
        vm: VmUid,
        /// The owner that is believed dead.
        from: Owner,
        /// The epoch in which `from` owns the VM.
        epoch: Epoch,
        /// The new owner, whose lease must be valid.
        to: Owner,
    },
    /// Manual fencing confirmation: an administrator confirms that nothing of `victim` runs any
    /// more. Counts for this one generation only.
    ConfirmFenced {
        victim: Owner,
        /// How the administrator confirmed it.
        confirmation: AdminConfirmation,
    },
    /// Reserve space for a VM's saved state (quick migration), before the guest is paused.
    ReserveSavedState {
        vm: VmUid,
        /// The VM's owner.
        from: Owner,
        /// The epoch in which `from` owns the VM: a copy that is decided late changes nothing.
        epoch: Epoch,
        /// An upper bound for RAM and device state.
        size: Bytes,
    },
    /// The saved state is complete and flushed.
    FinishSavedState {
        vm: VmUid,
        /// The VM's owner.
        from: Owner,
        /// The epoch in which `from` owns the VM: a copy that is decided late changes nothing.
        epoch: Epoch,
        /// How many bytes were written.
        length: Bytes,
        /// CRC32C over all of them, in order.
        crc32c: u32,
    },
    /// Free a VM's saved state, after it was restored or given up.
    DropSavedState {
        vm: VmUid,
        /// The VM's owner.
        from: Owner,
        /// The epoch in which `from` owns the VM: a copy that is decided late changes nothing.
        epoch: Epoch,
    },
}

/// The coordinator's answer to a granted change, sent after the change is durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// To a registration or a rejoin.
    Slot {
        /// The slot and generation that the node now has.
        owner: Owner,
        /// The VMs that went over from the earlier generation.
        kept: Vec<VmUid>,
    },
    /// The VM as it is now.
    Row(VmRow),
    /// The disk as it is now.
    Disk(DiskRow),
    /// The saved state as it is now.
    SavedState(SavedStateRow),
    /// The object was deleted, now or earlier.
    Gone,
    /// The fence record of the victim.
    Fenced(FenceRow),
}
