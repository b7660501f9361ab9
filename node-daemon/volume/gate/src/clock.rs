//! `CLOCK_BOOTTIME`, the clock of all leases, and the boot that its times belong to. And waiting, as a trait:
//! tests run the threads of a process on a clock and a scheduler of their own.

use std::fmt;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bascule_types::{BootId, BootTime};
use rustix::time::{ClockId, clock_gettime};

/// The present time of the host's `CLOCK_BOOTTIME`, which counts through suspend and cannot be set.
#[must_use]
pub fn boot_time_now() -> BootTime {
    let now = clock_gettime(ClockId::Boottime);
    // The kernel reports no negative boot time. If it did, 0 would make every lease look valid;
    // the largest value makes every lease look expired.
    let seconds = u64::try_from(now.tv_sec).unwrap_or(u64::MAX);
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
    BootTime(
        seconds
            .saturating_mul(1_000_000_000)
            .saturating_add(nanoseconds),
    )
}

/// The host's present boot. `CLOCK_BOOTTIME` values of another boot mean nothing.
///
/// # Errors
/// When `/proc` is not mounted, or the kernel's text is not a UUID.
pub fn boot_id() -> io::Result<BootId> {
    std::fs::read_to_string(BOOT_ID_PATH)?
        .trim()
        .parse()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// The clock of a process, and where its threads wait.
pub trait Clock: fmt::Debug + Send + Sync {
    /// `CLOCK_BOOTTIME`.
    fn now(&self) -> BootTime;

    /// Waits until [`Changes::count`] differs from `seen`, or `timeout` has passed.
    fn wait_for_change(&self, changes: &Changes, seen: u64, timeout: Duration);

    /// Wakes the threads that wait for a change of `changes`, after [`Changes::add`].
    fn wake(&self, changes: &Changes);
}

/// The clock of this host.
#[derive(Clone, Copy, Debug, Default)]
pub struct LinuxClock;

impl Clock for LinuxClock {
    fn now(&self) -> BootTime {
        boot_time_now()
    }

    fn wait_for_change(&self, changes: &Changes, seen: u64, timeout: Duration) {
        let waited = changes
            .changed
            .wait_timeout_while(changes.lock(), timeout, |count| *count == seen);
        drop(waited);
    }

    fn wake(&self, changes: &Changes) {
        changes.changed.notify_all();
    }
}

/// Counts changes of something that threads wait for.
#[derive(Debug, Default)]
pub struct Changes {
    count: Mutex<u64>,
    changed: Condvar,
}

impl Changes {
    /// How many changes there have been.
    #[must_use]
    pub fn count(&self) -> u64 {
        *self.lock()
    }

    /// Counts one more.
    pub fn add(&self) {
        let mut count = self.lock();
        *count = count.wrapping_add(1);
    }

    fn lock(&self) -> MutexGuard<'_, u64> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const BOOT_ID_PATH: &str = "/proc/sys/kernel/random/boot_id";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_clock_does_not_go_back() {
        let earlier = boot_time_now();
        assert!(earlier.0 > 0);
        assert!(boot_time_now() >= earlier);
    }
    #[test]
    fn the_boot_id_stays_the_same_while_the_host_runs() {
        assert!(!boot_id().unwrap().is_nil());
        assert_eq!(boot_id().unwrap(), boot_id().unwrap());
    }
}
