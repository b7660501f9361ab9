//! Why a coordinator refuses a [`Change`](crate::Change). A refused change alters nothing.

use serde::{Deserialize, Serialize};

use crate::{Bytes, Epoch, Owner, SlotId};

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
    /// Fencing is LeaseOnly: only an administrator's fencing confirmation counts.
    #[error("fencing LeaseOnly needs an administrator's fencing confirmation")]
    AdminConfirmation,
    /// The victim had no hardware watchdog.
    #[error(
        "it ran without a hardware watchdog, so only an administrator's fencing confirmation counts"
    )]
    NoWatchdog,
}
