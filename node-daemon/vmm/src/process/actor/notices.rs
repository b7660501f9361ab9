//! What the threads of a machine leave for the actor; [`super::guest_ended`] takes it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bascule_devices::failure::DeviceFailure;
use bascule_ipc::vm::{Panic, ResetCause, StopReason};
use bascule_types::OnPanic;

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

    /// The guest's kernel has panicked.
    pub(super) fn guest_panicked(&mut self, policy: OnPanic, panic: Panic) {
        if let Some(cause) = panic_effect(policy, panic) {
            self.guest_ended(GuestEnd::Reset(cause));
        }
    }
}

/// What a panic does: the cause for which the machine is reset, none when the guest stays as it is.
const fn panic_effect(policy: OnPanic, panic: Panic) -> Option<ResetCause> {
    match (policy, panic) {
        (OnPanic::Restart, Panic::Panicked) => Some(ResetCause::Panic),
        // The crash kernel resets the machine when it has saved the memory, and a reset before would lose that.
        (OnPanic::Restart, Panic::CrashLoaded) | (OnPanic::Leave, _) => None,
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that is reset while its crash kernel saves the memory has nothing to find out by.
    #[test]
    fn only_a_panic_that_nothing_in_the_guest_handles_resets_it_and_only_if_it_is_not_to_be_left() {
        let reset = Some(ResetCause::Panic);
        for (policy, panic, expected) in [
            (OnPanic::Restart, Panic::Panicked, reset),
            (OnPanic::Restart, Panic::CrashLoaded, None),
            (OnPanic::Leave, Panic::Panicked, None),
            (OnPanic::Leave, Panic::CrashLoaded, None),
        ] {
            assert_eq!(panic_effect(policy, panic), expected);
            let mut notices = Notices::default();
            notices.guest_panicked(policy, panic);
            assert_eq!((notices.reset, notices.stop), (expected, None));
        }
    }
}
