//! The one clock that leases are measured with.

use bascule_types::BootTime;
use rustix::time::{ClockId, clock_gettime};

/// This moment on the host's `CLOCK_BOOTTIME`: counts through suspend and is set by nobody.
#[must_use]
pub fn boot_time_now() -> BootTime {
    let now = clock_gettime(ClockId::Boottime);
    // The kernel never reports a negative boot time; were it to, the moment 0 is the one in which
    // every lease of an earlier moment still looks valid, so take the far end instead.
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
