//! The write gate: the check that every write passes right before its submission.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use bascule_types::Owner;
use bascule_volume_gate::{GateClosedReason, GateReader, boot_time_now};

/// Decides whether a write may be submitted at this moment.
pub trait WriteGate: Send + Sync + fmt::Debug {
    /// Called right before each submission, and every few milliseconds while writes wait.
    fn is_open(&self) -> bool;
}

/// The gate of a disk that no other node can write: a plain file in embedded mode without a volume.
#[derive(Clone, Copy, Debug, Default)]
pub struct AlwaysOpen;

impl WriteGate for AlwaysOpen {
    fn is_open(&self) -> bool {
        true
    }
}

/// The gate of a volume, for one owner. The VMM replaces the owner when the node has rejoined the
/// volume in a new generation and kept the ownership of the virtual machine.
#[derive(Debug)]
pub struct VolumeGate {
    reader: Arc<GateReader>,
    owner: Mutex<Owner>,
}

impl VolumeGate {
    /// A gate that is open while the gate page of `reader` shows a valid lease of `owner`.
    #[must_use]
    pub fn new(reader: Arc<GateReader>, owner: Owner) -> Self {
        Self {
            reader,
            owner: Mutex::new(owner),
        }
    }

    /// Replaces the owner for all further checks.
    pub fn set_owner(&self, owner: Owner) {
        *self.owner.lock().unwrap_or_else(PoisonError::into_inner) = owner;
    }

    /// Why the gate is closed; `None` when it is open.
    #[must_use]
    pub fn closed_reason(&self) -> Option<GateClosedReason> {
        let owner = *self.owner.lock().unwrap_or_else(PoisonError::into_inner);
        let checked = self.reader.check(boot_time_now(), owner);
        checked.err().map(|closed| closed.reason)
    }
}

impl WriteGate for VolumeGate {
    fn is_open(&self) -> bool {
        self.closed_reason().is_none()
    }
}
