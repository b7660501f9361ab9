//! What the threads of a machine leave for the actor; [`super::guest_ended`] takes it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bascule_devices::failure::DeviceFailure;
use bascule_ipc::vm::{ResetCause, StopReason};

use crate::GuestEnd;

/// What device and vCPU threads leave for the actor, because they must not wait for its inbox.
#[derive(Debug, Default)]
pub(super) struct Notices {
    /// Why the guest ended by itself; the first reason counts.
    pub(super) stop: Option<StopReason>,
    /// Why the machine is to be reset; the first cause counts. A guest that has ended is not reset.
    pub(super) reset: Option<ResetCause>,
    /// Failed disks whose guest runs on.
    pub(super) disk_failures: Vec<DeviceFailure>,
}

/// Locks the notices. They are consistent after every assignment, so that a poisoned lock is used.
pub(super) fn lock(notices: &Arc<Mutex<Notices>>) -> MutexGuard<'_, Notices> {
    notices.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Notices {
    /// The guest has ended by itself.
    pub(super) fn guest_ended(&mut self, end: GuestEnd) {
        match end {
            GuestEnd::Stopped(reason) => drop(self.stop.get_or_insert(reason)),
            GuestEnd::Reset(cause) => drop(self.reset.get_or_insert(cause)),
        }
    }
}

/// How a guest ended, for whoever waited for something else.
pub(super) fn ended_text(reason: &StopReason) -> String {
    match reason {
        StopReason::GuestShutdown => "the guest has shut itself down".to_owned(),
        StopReason::GuestReset => "the guest has reset itself".to_owned(),
        StopReason::Requested => "the guest was stopped".to_owned(),
        StopReason::GuestFault { what } | StopReason::Failed { what } => {
            format!("the guest has ended: {what}")
        }
    }
}
