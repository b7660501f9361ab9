//! Why a coordinator refuses a [`Change`](crate::Change). A refused change alters nothing.
//!
//! The messages are shown to users, in conditions, events and on the command line.

use serde::{Deserialize, Serialize};

use crate::{Bytes, Epoch, Owner, SlotId};

/// Why the coordinator refused a change. Nothing was altered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Refusal {
    /// A [`RowName`](crate::RowName) is empty, too long, or has other than visible ASCII.
    #[error("the name must be 1 to 191 visible ASCII characters")]
    BadName,
    /// The volume has no row for this VM: it was never created there, or was deleted.
    #[error("this volume has no such VM")]
    NoSuchVm,
    /// The volume has no row for this disk.
    #[error("this volume has no such disk")]
    NoSuchDisk,
    /// No saved state of this VM, or none of the VM's present epoch.
    #[error("this VM has no saved state on the volume")]
    NoSavedState,
    /// The VM has another owner or another epoch than the request names.
    #[error("the VM is owned by {owner} in epoch {epoch}")]
    OwnedBy { owner: Owner, epoch: Epoch },
    /// The VM has no owner, and another epoch than the request expects.
    #[error("the VM has no owner; its epoch is {epoch}")]
    EpochIs { epoch: Epoch },
    /// Release and transfer are accepted from the owner's node only: no other node knows whether
    /// the guest is stopped and its writes have completed.
    #[error("only the node of {owner} may request this")]
    OwnersNodeOnly { owner: Owner },
    /// The slot is held by another node, or its present generation is another one.
    #[error("{owner} is not the present holder of its slot")]
    StaleOwner { owner: Owner },
    /// A fence record for this owner is in the metadata: its processes must stop.
    #[error("{owner} was fenced")]
    Fenced { owner: Owner },
    /// A takeover was requested without proof that the owner has stopped writing.
    #[error("no proof yet that {victim} will not write again: {missing}")]
    NotFenced {
        /// The owner that would lose the VM.
        victim: Owner,
        missing: MissingProof,
    },
    /// The coordinator has not seen the requested owner's heartbeat rise within the watch time W.
    #[error("the lease of {owner} is not valid")]
    LeaseInvalid { owner: Owner },
    /// The VM's state was saved completely in this epoch: only a later epoch's owner may free it. A
    /// late copy of an earlier request would otherwise destroy it.
    #[error("this VM's memory was saved completely in this epoch; only its next owner may free it")]
    SavedStateComplete,
    /// A disk of this name exists, attached to another VM or kept after its VM was deleted.
    #[error("a disk of that name exists on the volume; it belongs to another VM or was kept")]
    NameTaken,
    /// A disk of this name exists for this VM, with other properties than the request has.
    #[error("the disk exists with another size or role")]
    DiskDiffers,
    /// The disk cannot be opened or attached before [`Change::FinishImport`](crate::Change).
    #[error("the disk's import has not finished")]
    Importing,
    /// Another node fills the disk and has not been fenced.
    #[error("the disk is being imported by {owner}")]
    ImportedElsewhere { owner: Owner },
    /// The kept disk was created in another namespace than the VM's.
    #[error("the disk belongs to another namespace")]
    OtherNamespace,
    /// The extent region has too few free extents.
    #[error("the volume has {free} free; {needed} are needed")]
    Full { free: Bytes, needed: Bytes },
    /// A table of the metadata has no room for another entry.
    #[error("the volume has no room for another {what:?}")]
    TableFull { what: Table },
    /// The heartbeat slot is held by another node.
    #[error("slot {slot} is taken by another node")]
    SlotTaken { slot: SlotId },
    /// The node's release does not support features of the volume that were raised, or its heartbeat was not read yet.
    #[error(
        "the node needs a newer release: the volume has the features {features:#x}, which it does not show"
    )]
    FeaturesMissing {
        /// One bit for each.
        features: u64,
    },
    /// The volume's fencing mode or policy excludes this change.
    #[error("the volume's fencing mode does not allow this")]
    NotAllowed,
}

/// A table of the metadata that can be full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Table {
    /// All rows together: as many as one checkpoint has room for.
    Rows,
    /// Heartbeat slots, at most 64; the number is fixed when the volume is formatted.
    Slots,
    /// VM rows.
    Vms,
    /// Disk rows.
    Disks,
    /// Fence records.
    Fences,
    /// The 24 extent runs of one disk or saved state: the free space is too fragmented.
    Extents,
}

/// What is missing for a fence proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
pub enum MissingProof {
    /// The node's heartbeat rose less than one lease ago, or its slot was never read.
    #[error("its heartbeat is alive")]
    Alive,
    /// The safe time has not passed since the coordinator last saw the heartbeat rise.
    #[error("no heartbeat for {watched_ms} ms of the {required_ms} ms required")]
    SafeTime {
        /// Time without a new heartbeat, by the coordinator's own reads, in milliseconds.
        watched_ms: u64,
        /// The safe time by the victim's own heartbeat record, in milliseconds.
        required_ms: u64,
    },
    /// Fencing is LeaseOnly, or the victim never wrote a heartbeat: only an administrator's
    /// fencing confirmation counts.
    #[error("fencing LeaseOnly needs a manual fencing confirmation")]
    AdminConfirmation,
    /// The victim ran without a hardware watchdog, so nothing is known to reset it.
    #[error("it ran without a hardware watchdog, so only a manual fencing confirmation counts")]
    NoWatchdog,
}
