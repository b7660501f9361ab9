//! The vocabulary that all of Bascule's crates share: identities, units and ownership.
//!
//! This crate holds plain values only. It must not know Kubernetes, KVM, sockets or files.
//! Read next: `bascule-volume-format` (how these values lie on a disk) and `bascule-ipc` (how they
//! travel between a node's processes).

mod id;
mod owner;
mod units;

pub use id::{AttemptId, ClusterId, DiskId, NodeUid, ParseIdError, VmUid, VolumeId};
pub use owner::{Epoch, Generation, Owner, SlotId};
pub use units::{BootTime, Bytes, Lba, Sectors, UnitError};
