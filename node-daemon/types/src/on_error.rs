//! What a disk does when a command on it fails.

use serde::{Deserialize, Serialize};

/// What happens when the device fails a read or a write of a disk: a bad sector, no space on a thin
/// volume. A lost path to the device is no such error: the guest waits for it, whatever the policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnError {
    /// The guest gets the error.
    #[default]
    Report,
    /// The guest is paused, and does not get the error.
    Pause,
}

impl OnError {
    /// Whether this is the policy of a document that names none.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}
