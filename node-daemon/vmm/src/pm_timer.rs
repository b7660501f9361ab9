//! The ACPI power management timer (ACPI 6.5, 4.8.3.3): a free-running, read-only counter of
//! 3.579545 MHz with 32 bits, by which firmware and old kernels measure time.
//!
//! It counts while the machine exists, also while its guest is paused, as the KVM clock does. A guest that
//! moves finds it where it stopped: neither clock counts between saving and restoring.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock::HostClock;

/// Ticks per second.
const FREQUENCY_HZ: u128 = 3_579_545;
const NANOSECONDS: u128 = 1_000_000_000;
/// Bytes of the register.
const REGISTER_BYTES: usize = 4;

/// The timer. Shared by all vCPU threads.
#[derive(Debug)]
pub(crate) struct PmTimer {
    clock: Arc<dyn HostClock>,
    /// What the timer's age is ahead of the host's clock, in nanoseconds modulo 2^64.
    ahead_ns: AtomicU64,
}

impl PmTimer {
    /// A timer at 0.
    pub(crate) fn new(clock: Arc<dyn HostClock>) -> Self {
        let timer = Self {
            clock,
            ahead_ns: AtomicU64::new(0),
        };
        timer.restore(0);
        timer
    }

    /// A reset: the timer begins at 0 again.
    pub(crate) fn reset(&self) {
        self.restore(0);
    }

    /// A guest's read at byte `offset` of the register, also of several registers by a string instruction.
    pub(crate) fn read(&self, offset: u16, data: &mut [u8]) {
        let skipped = usize::from(offset).min(REGISTER_BYTES - 1);
        for register in data.chunks_mut(REGISTER_BYTES - skipped) {
            let value = self.ticks().to_le_bytes();
            for (to, from) in register.iter_mut().zip(value.iter().skip(skipped)) {
                *to = *from;
            }
        }
    }

    /// The timer's age in nanoseconds.
    pub(crate) fn save(&self) -> u64 {
        self.now_ns()
            .wrapping_add(self.ahead_ns.load(Ordering::SeqCst))
    }

    /// Continues at the age `age_ns`.
    pub(crate) fn restore(&self, age_ns: u64) {
        self.ahead_ns
            .store(age_ns.wrapping_sub(self.now_ns()), Ordering::SeqCst);
    }

    fn ticks(&self) -> u32 {
        let ticks = u128::from(self.save()) * FREQUENCY_HZ / NANOSECONDS;
        u32::try_from(ticks & u128::from(u32::MAX)).unwrap_or(0)
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.clock.monotonic().as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock::ManualClock;

    fn read(timer: &PmTimer) -> u32 {
        let mut value = [0; 4];
        timer.read(0, &mut value);
        u32::from_le_bytes(value)
    }

    fn booted(seconds: u64) -> Arc<ManualClock> {
        ManualClock::at(Duration::from_secs(seconds), Duration::ZERO)
    }

    #[test]
    fn acpi_4_8_3_3_it_counts_3579545_times_a_second_and_wraps_at_32_bits() {
        let clock = booted(1_000);
        let timer = PmTimer::new(Arc::clone(&clock) as Arc<dyn HostClock>);
        assert_eq!(read(&timer), 0);
        clock.advance(Duration::from_secs(1));
        assert_eq!(read(&timer), 3_579_545);
        clock.advance(Duration::from_millis(500));
        assert_eq!(read(&timer), 5_369_317);
        clock.advance(Duration::from_secs(1200));
        assert_eq!(u64::from(read(&timer)), 4_300_823_317 - (1 << 32));
    }

    #[test]
    fn acpi_4_8_3_3_the_value_is_undefined_after_a_reset_and_here_0() {
        let clock = booted(5);
        let timer = PmTimer::new(Arc::clone(&clock) as Arc<dyn HostClock>);
        clock.advance(Duration::from_secs(9));
        timer.reset();
        assert_eq!(read(&timer), 0);
        clock.advance(Duration::from_secs(1));
        assert_eq!(read(&timer), 3_579_545);
    }

    #[test]
    fn a_moved_timer_goes_on_where_it_stopped_whatever_the_other_hosts_clock_says() {
        let here = booted(1_000_000);
        let old = PmTimer::new(Arc::clone(&here) as Arc<dyn HostClock>);
        here.advance(Duration::from_secs(100));
        let (seen, saved) = (read(&old), old.save());
        let there = booted(7);
        let new = PmTimer::new(Arc::clone(&there) as Arc<dyn HostClock>);
        there.advance(Duration::from_secs(3));
        new.restore(saved);
        assert_eq!(read(&new), seen);
        there.advance(Duration::from_secs(1));
        assert_eq!(read(&new), seen + 3_579_545);
    }

    #[test]
    fn parts_of_the_register_and_several_at_once_are_read() {
        let clock = booted(0);
        let timer = PmTimer::new(Arc::clone(&clock) as Arc<dyn HostClock>);
        clock.advance(Duration::from_secs(1));
        let [a, b, c, d] = 3_579_545_u32.to_le_bytes();
        let mut twice = [0; 8];
        timer.read(0, &mut twice);
        assert_eq!(twice, [a, b, c, d, a, b, c, d]);
        let mut high = [0; 2];
        timer.read(2, &mut high);
        assert_eq!(high, [c, d]);
        let mut last = [0; 1];
        timer.read(3, &mut last);
        assert_eq!(last, [d]);
    }
}
