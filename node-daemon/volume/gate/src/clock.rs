//! `CLOCK_BOOTTIME`: the clock of all leases.

use bascule_types::BootTime;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_clock_does_not_go_back() {
        let earlier = boot_time_now();
        assert!(earlier.0 > 0);
        assert!(boot_time_now() >= earlier);
    }
}
