//! How a guest ends its run by itself.

use bascule_ipc::vm::{ResetCause, StopReason};

/// How a guest ends its run by itself: reported by the threads of its vCPUs and devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// It is off, or cannot go on.
    Stopped(StopReason),
    /// Its machine is to be reset, for this cause.
    Reset(ResetCause),
}

impl GuestEnd {
    /// The guest's fault `what`, after which it cannot go on.
    pub(crate) fn fault(what: impl Into<String>) -> Self {
        Self::Stopped(StopReason::GuestFault { what: what.into() })
    }

    /// A failure of this side.
    pub(crate) fn failed(what: impl Into<String>) -> Self {
        Self::Stopped(StopReason::Failed { what: what.into() })
    }
}
