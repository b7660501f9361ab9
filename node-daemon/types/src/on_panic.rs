//! What a panic of a guest's kernel does.

use serde::{Deserialize, Serialize};

/// What happens when the guest's kernel panics and goes no further. A kernel that has a crash kernel (kdump) goes
/// on, whatever the policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnPanic {
    /// The guest's machine is reset.
    #[default]
    Restart,
    /// The guest stays as it is.
    Leave,
}

impl OnPanic {
    /// Whether this is the policy of a document that names none.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}
