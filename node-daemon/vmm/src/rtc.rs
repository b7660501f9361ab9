//! The CMOS clock and its memory (MC146818A data sheet), ports 0x70 and 0x71: firmware and kernels learn the
//! time from it.
//!
//! It shows the host's time, ahead or behind by what the guest has set. That difference moves with the
//! guest, and a reset keeps it, as a battery does: the clock of a guest that was saved for hours, or whose
//! host was frozen, is right at once. It is lost when the machine is stopped: a guest that keeps
//! local time in it sets it again.
//!
//! There is no interrupt. Alarm and periodic rate can be set and never fire; DSDT names no line, and guests
//! that wait for the next second poll.

mod calendar;
mod registers;

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use self::registers::{BYTES, Registers};
use crate::blob::Blob;
use crate::clock::HostClock;

pub(crate) use self::registers::CENTURY;

/// The clock. Shared by all vCPU threads.
#[derive(Debug)]
pub(crate) struct Rtc {
    clock: Arc<dyn HostClock>,
    ram: RamSizes,
    registers: Mutex<Registers>,
}

/// The RAM that the memory tells firmware about, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RamSizes {
    /// From address 0 up.
    pub(crate) low: u64,
    /// From 4 GiB up.
    pub(crate) high: u64,
}

/// The saved state, first layout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SavedRtc {
    /// The register that the guest has selected.
    index: u8,
    /// What the guest's time is ahead of the host's, in microseconds.
    ahead_us: i64,
    /// All registers and memory. While the clock is stopped, its registers hold the time.
    bytes: Blob<[u8; BYTES]>,
}

impl Rtc {
    /// A clock that shows the host's time in UTC.
    pub(crate) fn new(clock: Arc<dyn HostClock>, ram: RamSizes) -> Self {
        Self {
            clock,
            ram,
            registers: Mutex::new(Registers::new(ram)),
        }
    }

    /// A reset: the time stays, all else is as in a new clock.
    pub(crate) fn reset(&self) {
        let now = self.now_us();
        let registers = &mut *self.lock();
        *registers = registers.reset(self.ram, now);
    }

    /// Guest write to the index port.
    pub(crate) fn select(&self, index: u8) {
        self.lock().select(index);
    }

    /// Guest read from the data port.
    pub(crate) fn read(&self) -> u8 {
        let now = self.now_us();
        self.lock().read(now)
    }

    /// Guest write to the data port.
    pub(crate) fn write(&self, value: u8) {
        let now = self.now_us();
        self.lock().write(value, now);
    }

    pub(crate) fn save(&self) -> SavedRtc {
        let registers = self.lock();
        SavedRtc {
            index: registers.index(),
            ahead_us: registers.ahead_us(),
            bytes: Blob::of(registers.bytes()),
        }
    }

    /// Restores a saved state; every one is possible.
    pub(crate) fn restore(&self, saved: &SavedRtc) {
        *self.lock() = Registers::restored(saved.bytes.get(), saved.index, saved.ahead_us);
    }

    fn now_us(&self) -> i64 {
        i64::try_from(self.clock.realtime().as_micros()).unwrap_or(i64::MAX)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
pub(crate) use self::tests::saved;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock::ManualClock;

    const RAM: RamSizes = RamSizes {
        low: 64 << 20,
        high: 0,
    };

    /// A saved state with a recognizable value in every part.
    pub(crate) fn saved() -> SavedRtc {
        SavedRtc {
            index: 9,
            ahead_us: -3_600_000_000,
            bytes: Blob::of(&[7; BYTES]),
        }
    }

    fn read(rtc: &Rtc, index: u8) -> u8 {
        rtc.select(index);
        rtc.read()
    }

    fn write(rtc: &Rtc, index: u8, value: u8) {
        rtc.select(index);
        rtc.write(value);
    }

    fn rtc(clock: &Arc<ManualClock>) -> Rtc {
        Rtc::new(Arc::clone(clock) as Arc<dyn HostClock>, RAM)
    }

    /// Hours, minutes and seconds.
    fn time(rtc: &Rtc) -> [u8; 3] {
        [4, 2, 0].map(|index| read(rtc, index))
    }

    /// 2026-11-28T14:35:07Z on a host that has run for some seconds.
    fn host(booted: u64) -> Arc<ManualClock> {
        ManualClock::at(
            Duration::from_secs(booted),
            Duration::from_secs(1_795_876_507),
        )
    }

    #[test]
    fn the_clock_of_a_moved_guest_follows_the_hosts_however_long_it_was_saved() {
        let here = host(9_999);
        let old = rtc(&here);
        // The guest keeps its clock an hour ahead.
        write(&old, 0x0B, 0x82);
        write(&old, 4, 0x15);
        write(&old, 0x0B, 0x02);
        assert_eq!(time(&old), [0x15, 0x35, 0x07]);
        let saved = old.save();
        let there = host(3);
        let new = rtc(&there);
        there.advance(Duration::from_secs(5 * 3600));
        assert_eq!(time(&new), [0x19, 0x35, 0x07], "the control: not restored");
        new.restore(&saved);
        assert_eq!(time(&new), [0x20, 0x35, 0x07]);
        assert_eq!(new.save().ahead_us, saved.ahead_us);
    }

    #[test]
    fn a_reset_keeps_the_time_and_forgets_all_else() {
        let clock = host(0);
        let rtc = rtc(&clock);
        let new = rtc.save();
        write(&rtc, 0x0B, 0x82);
        write(&rtc, 4, 0x15);
        write(&rtc, 0x0F, 0x0A);
        write(&rtc, 0x0A, 0x2F);
        write(&rtc, 1, 0x59);
        rtc.reset();
        assert_eq!(read(&rtc, 0x0F), 0);
        assert_eq!(time(&rtc), [0x15, 0x35, 0x07]);
        clock.advance(Duration::from_secs(1));
        assert_eq!(time(&rtc), [0x15, 0x35, 0x08], "it runs");
        rtc.select(0);
        let after = SavedRtc {
            ahead_us: 0,
            ..rtc.save()
        };
        assert_eq!(after, new);
    }

    #[test]
    fn a_stopped_clock_moves_with_its_time() {
        let old = rtc(&host(0));
        write(&old, 0x0B, 0x82);
        write(&old, 0, 0x42);
        let there = host(0);
        let new = rtc(&there);
        new.restore(&old.save());
        there.advance(Duration::from_secs(600));
        assert_eq!(time(&new), [0x14, 0x35, 0x42]);
        write(&new, 0x0B, 0x02);
        there.advance(Duration::from_secs(1));
        assert_eq!(time(&new), [0x14, 0x35, 0x43]);
    }

    #[test]
    fn no_saved_state_is_impossible() {
        let mut seed = 1_u64;
        let mut random = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33).to_le_bytes()[0]
        };
        for _ in 0..2_000 {
            let bytes = std::array::from_fn(|_| random());
            let ahead = std::array::from_fn(|_| random());
            let rtc = rtc(&host(0));
            rtc.restore(&SavedRtc {
                index: random(),
                ahead_us: i64::from_le_bytes(ahead),
                bytes: Blob::of(&bytes),
            });
            for _ in 0..50 {
                write(&rtc, random(), random());
                read(&rtc, random());
            }
            rtc.reset();
            assert_eq!(read(&rtc, 0x0A) & 0x7F, 0x26);
        }
    }
}
