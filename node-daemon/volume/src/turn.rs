//! Something that one thread at a time does, and may wait in: a mutex whose waiting goes through
//! [`Host`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bascule_volume_gate::Changes;

use crate::host::Host;

/// Taken by one thread at a time.
#[derive(Debug)]
pub struct Turn {
    host: Arc<dyn Host>,
    taken: AtomicBool,
    changes: Changes,
}

/// Gives the turn back when it is dropped.
#[derive(Debug)]
#[must_use]
pub struct TurnGuard<'a>(&'a Turn);

impl Turn {
    /// A turn that nobody has.
    #[must_use]
    pub fn new(host: Arc<dyn Host>) -> Self {
        Self {
            host,
            taken: AtomicBool::new(false),
            changes: Changes::default(),
        }
    }

    /// Waits for the turn.
    pub fn lock(&self) -> TurnGuard<'_> {
        loop {
            let seen = self.changes.count();
            if !self.taken.swap(true, Ordering::SeqCst) {
                return TurnGuard(self);
            }
            self.host
                .wait_for_change(&self.changes, seen, LOOK_AGAIN_AFTER);
        }
    }
}

impl Drop for TurnGuard<'_> {
    fn drop(&mut self) {
        self.0.taken.store(false, Ordering::SeqCst);
        self.0.changes.add();
        self.0.host.wake(&self.0.changes);
    }
}

/// Nothing depends on it: the end of a turn wakes who waits.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(60);
