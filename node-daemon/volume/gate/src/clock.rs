//! `CLOCK_BOOTTIME`, the clock of all leases, and the boot that its times belong to.

use std::io;

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
