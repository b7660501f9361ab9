//! The gate that every write passes.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use bascule_types::Owner;
use bascule_volume_gate::{GateClosedReason, GateReader, boot_time_now};

/// Whether a write may be submitted at this moment.
pub trait WriteGate: Send + Sync + fmt::Debug {
    /// Asked right before each submission, and again every few milliseconds while writes wait.
    fn is_open(&self) -> bool;
}

/// The gate of a disk that no one else can write: a plain file in embedded mode without a volume.
#[derive(Clone, Copy, Debug, Default)]
pub struct AlwaysOpen;

impl WriteGate for AlwaysOpen {
    fn is_open(&self) -> bool {
        true
    }
}

/// The gate of a volume, for one owner. The machine exchanges the owner when the node's slot has
/// re-joined in a new generation and the virtual machine's row was kept.
#[derive(Debug)]
pub struct VolumeGate {
    reader: Arc<GateReader>,
    owner: Mutex<Owner>,
}

impl VolumeGate {
    /// The gate that `reader` shows, open while `owner` holds the lease.
    #[must_use]
    pub fn new(reader: Arc<GateReader>, owner: Owner) -> Self {
        Self {
            reader,
            owner: Mutex::new(owner),
        }
    }

    /// Writes on behalf of `owner` from now on.
    pub fn set_owner(&self, owner: Owner) {
        *self.owner.lock().unwrap_or_else(PoisonError::into_inner) = owner;
    }

    /// Why the gate is closed now, if it is.
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
