//! The registers of the clock as a value: each access gets the host's time and does nothing else.
//!
//! # States
//! ```text
//!            SET, or the divider in reset
//!  running ───────────────────────────────► stopped
//!     ▲    neither: the time is what the      │
//!     └──  guest has left in the registers  ──┘
//! ```
//! Running, the time is the host's and a difference; stopped, it is in the time registers. A write to a time register
//! of a running clock sets the time at once.

use super::RamSizes;
use super::calendar::{Date, weekday};

/// Registers and memory.
pub(super) const BYTES: usize = 128;
const INDEX_MASK: u8 = 0x7F;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const CONTROL_A: u8 = 0x0A;
const CONTROL_B: u8 = 0x0B;
const FLAGS: u8 = 0x0C;
const VALID: u8 = 0x0D;
/// The century, in the byte that FADT names (ACPI 6.5, table 5.9, `CENTURY`).
pub(crate) const CENTURY: u8 = 0x32;

/// Register A: an update is in progress.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Register A: divider; the value with both upper bits set holds it in reset.
const DIVIDER_RESET: u8 = 0b110 << 4;
/// Register A at power-on: a crystal of 32,768 Hz, a periodic rate of 1,024 Hz.
const CONTROL_A_START: u8 = 0x26;
/// Register B: the clock is stopped to be set.
const SET: u8 = 1 << 7;
/// Register B: numbers are binary, not decimal digits.
const BINARY: u8 = 1 << 2;
/// Register B: hours count to 24.
const HOURS_24: u8 = 1 << 1;
/// Register C: the time has been updated since the register was last read.
const UPDATE_ENDED: u8 = 1 << 4;
/// Register D: the battery has never failed.
const BATTERY_GOOD: u8 = 1 << 7;
/// Hours register, counting to 12: afternoon.
const AFTERNOON: u8 = 1 << 7;

const SECOND_US: i64 = 1_000_000;
const DAY_SECONDS: i64 = 86_400;
/// An update is announced for so long before it (data sheet, `tBUC`).
const UPDATE_US: i64 = 244;
/// The first update comes so long after the divider has left its reset.
const FIRST_UPDATE_US: i64 = SECOND_US / 2;

/// All registers, and what the time is ahead of the host's.
#[derive(Clone, Debug)]
pub(super) struct Registers {
    bytes: [u8; BYTES],
    index: u8,
    ahead_us: i64,
    /// The second at which register C was last read.
    flags_read: i64,
}

impl Registers {
    /// A clock at the host's time.
    pub(super) fn new(ram: RamSizes) -> Self {
        let mut bytes = [0; BYTES];
        let kib = |bytes: u64| bytes >> 10;
        let above = |start: u64| ram.low.saturating_sub(start);
        // Below 640 KiB; above 1 MiB, twice; above 16 MiB and above 4 GiB in units of 64 KiB.
        put(&mut bytes, 0x15, 2, kib(ram.low.min(640 << 10)));
        put(&mut bytes, 0x17, 2, kib(above(1 << 20)));
        put(&mut bytes, 0x30, 2, kib(above(1 << 20)));
        put(&mut bytes, 0x34, 2, above(16 << 20) >> 16);
        put(&mut bytes, 0x5B, 3, ram.high >> 16);
        let mut new = Self {
            bytes,
            index: 0,
            ahead_us: 0,
            flags_read: 0,
        };
        new.set_byte(CONTROL_A, CONTROL_A_START);
        new.set_byte(CONTROL_B, HOURS_24);
        new
    }

    /// A clock as it was saved.
    pub(super) fn restored(bytes: [u8; BYTES], index: u8, ahead_us: i64) -> Self {
        Self {
            bytes,
            index: index & INDEX_MASK,
            ahead_us,
            flags_read: 0,
        }
    }

    /// A new clock with this one's time, running.
    pub(super) fn reset(&self, ram: RamSizes, now_us: i64) -> Self {
        let mut running = self.clone();
        if running.is_stopped() {
            running.start(running.byte(CONTROL_B), false, now_us);
        }
        Self {
            ahead_us: running.ahead_us,
            ..Self::new(ram)
        }
    }

    pub(super) const fn bytes(&self) -> &[u8; BYTES] {
        &self.bytes
    }

    pub(super) const fn index(&self) -> u8 {
        self.index
    }

    pub(super) const fn ahead_us(&self) -> i64 {
        self.ahead_us
    }

    /// The highest bit of `index` masks non-maskable interrupts on a PC, of which there are none.
    pub(super) const fn select(&mut self, index: u8) {
        self.index = index & INDEX_MASK;
    }

    /// Reads the selected register at the host's time `now_us`.
    pub(super) fn read(&mut self, now_us: i64) -> u8 {
        let time = self.time_us(now_us);
        match self.index {
            CONTROL_A => {
                let updating =
                    !self.is_stopped() && time.rem_euclid(SECOND_US) >= SECOND_US - UPDATE_US;
                let control = self.byte(CONTROL_A) & !UPDATE_IN_PROGRESS;
                control | if updating { UPDATE_IN_PROGRESS } else { 0 }
            }
            FLAGS => {
                let second = time.div_euclid(SECOND_US);
                let before = std::mem::replace(&mut self.flags_read, second);
                if before == second || self.is_stopped() {
                    0
                } else {
                    UPDATE_ENDED
                }
            }
            VALID => BATTERY_GOOD,
            index if is_time(index) && !self.is_stopped() => {
                let mut shown = self.clone();
                shown.show(time.div_euclid(SECOND_US));
                shown.byte(index)
            }
            index => self.byte(index),
        }
    }

    /// Writes the selected register at the host's time `now_us`.
    pub(super) fn write(&mut self, value: u8, now_us: i64) {
        match self.index {
            FLAGS | VALID => {}
            CONTROL_A => {
                self.set_control(value & !UPDATE_IN_PROGRESS, self.byte(CONTROL_B), now_us)
            }
            CONTROL_B => self.set_control(self.byte(CONTROL_A), value, now_us),
            index if is_time(index) && !self.is_stopped() => {
                self.stop(now_us);
                self.set_byte(index, value);
                self.start(self.byte(CONTROL_B), false, now_us);
            }
            index => self.set_byte(index, value),
        }
    }

    fn set_control(&mut self, a: u8, b: u8, now_us: i64) {
        let was_stopped = self.is_stopped();
        let was_in_reset = in_reset(self.byte(CONTROL_A));
        let stops = b & SET != 0 || in_reset(a);
        if !was_stopped && stops {
            self.stop(now_us);
        }
        if was_stopped && !stops {
            self.start(b, was_in_reset, now_us);
        }
        self.set_byte(CONTROL_A, a);
        self.set_byte(CONTROL_B, b);
    }

    /// Leaves the present time in the time registers.
    fn stop(&mut self, now_us: i64) {
        self.show(self.time_us(now_us).div_euclid(SECOND_US));
    }

    /// Goes on from the time registers, read in the format of register B `control`. The second goes on where
    /// it was, unless the divider was in reset.
    fn start(&mut self, control: u8, from_reset: bool, now_us: i64) {
        let within = if from_reset {
            SECOND_US - FIRST_UPDATE_US
        } else {
            self.time_us(now_us).rem_euclid(SECOND_US)
        };
        let time = self.shown(control).wrapping_mul(SECOND_US) + within;
        self.ahead_us = time.wrapping_sub(now_us);
    }

    const fn time_us(&self, now_us: i64) -> i64 {
        now_us.wrapping_add(self.ahead_us)
    }

    fn is_stopped(&self) -> bool {
        self.byte(CONTROL_B) & SET != 0 || in_reset(self.byte(CONTROL_A))
    }

    /// Writes the time registers for `seconds` since 1970, in the format of register B.
    fn show(&mut self, seconds: i64) {
        let (days, second) = (
            seconds.div_euclid(DAY_SECONDS),
            seconds.rem_euclid(DAY_SECONDS),
        );
        let date = Date::from_days(days);
        let control = self.byte(CONTROL_B);
        let hour = second / 3600;
        let shown_hour = match hour {
            _ if control & HOURS_24 != 0 => number(hour, control),
            0 => number(12, control),
            1..12 => number(hour, control),
            12 => number(12, control) | AFTERNOON,
            _ => number(hour - 12, control) | AFTERNOON,
        };
        let registers = [
            (SECONDS, number(second % 60, control)),
            (MINUTES, number(second / 60 % 60, control)),
            (HOURS, shown_hour),
            (WEEKDAY, number(weekday(days).into(), control)),
            (DAY, number(date.day.into(), control)),
            (MONTH, number(date.month.into(), control)),
            (YEAR, number(date.year.rem_euclid(100), control)),
            (
                CENTURY,
                number(date.year.div_euclid(100).rem_euclid(100), control),
            ),
        ];
        for (index, value) in registers {
            self.set_byte(index, value);
        }
    }

    /// Seconds since 1970 that the time registers show in the format of register B `control`. Values that no
    /// clock shows count on: 61 seconds are a minute and a second.
    fn shown(&self, control: u8) -> i64 {
        let get = |index| value(self.byte(index), control);
        let hours = self.byte(HOURS);
        let hour = match value(hours & !AFTERNOON, control) {
            _ if control & HOURS_24 != 0 => value(hours, control),
            hour if hours & AFTERNOON != 0 => hour % 12 + 12,
            hour => hour % 12,
        };
        let date = Date {
            year: get(CENTURY) * 100 + get(YEAR),
            month: u8::try_from(get(MONTH).clamp(1, 12)).unwrap_or(1),
            day: u8::try_from(get(DAY)).unwrap_or(1),
        };
        date.to_days() * DAY_SECONDS + hour * 3600 + get(MINUTES) * 60 + get(SECONDS)
    }

    fn byte(&self, index: u8) -> u8 {
        self.bytes.get(usize::from(index)).copied().unwrap_or(0)
    }

    fn set_byte(&mut self, index: u8, value: u8) {
        if let Some(byte) = self.bytes.get_mut(usize::from(index)) {
            *byte = value;
        }
    }
}

/// Puts `value`, or the largest possible one, into `count` bytes from `first` on.
fn put(bytes: &mut [u8; BYTES], first: usize, count: usize, value: u64) {
    let max = (1_u64 << (8 * count)) - 1;
    let value = value.min(max).to_le_bytes();
    for (to, from) in bytes.iter_mut().skip(first).take(count).zip(value) {
        *to = from;
    }
}

const fn is_time(index: u8) -> bool {
    matches!(
        index,
        SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY
    )
}

const fn in_reset(control_a: u8) -> bool {
    control_a & DIVIDER_RESET == DIVIDER_RESET
}

/// How a register shows `number`, which is below 100.
fn number(number: i64, control: u8) -> u8 {
    let shown = if control & BINARY != 0 {
        number
    } else {
        number / 10 * 16 + number % 10
    };
    u8::try_from(shown).unwrap_or(0)
}

/// What the register `shown` says.
fn value(shown: u8, control: u8) -> i64 {
    let shown = i64::from(shown);
    if control & BINARY != 0 {
        shown
    } else {
        shown / 16 * 10 + shown % 16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-28T14:35:07Z, a Saturday.
    const NOW: i64 = 1_795_876_507 * SECOND_US;
    const RAM: RamSizes = RamSizes {
        low: 0xB000_0000,
        high: 5 << 30,
    };

    fn clock() -> Registers {
        Registers::new(RAM)
    }

    fn read(clock: &mut Registers, index: u8, now: i64) -> u8 {
        clock.select(index);
        clock.read(now)
    }

    fn write(clock: &mut Registers, index: u8, value: u8, now: i64) {
        clock.select(index);
        clock.write(value, now);
    }

    /// Century, year, month, day, day of the week, hours, minutes, seconds.
    fn time(clock: &mut Registers, now: i64) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS]
            .map(|index| read(clock, index, now))
    }

    #[test]
    fn a_new_clock_shows_the_hosts_time_in_decimal_digits_and_24_hours() {
        let shown = time(&mut clock(), NOW);
        assert_eq!(shown, [0x20, 0x26, 0x11, 0x28, 7, 0x14, 0x35, 0x07]);
        assert_eq!(read(&mut clock(), VALID, NOW), 0x80);
        assert_eq!(read(&mut clock(), 0x80 | CONTROL_B, NOW), 0x02);
    }

    #[test]
    fn other_formats_are_shown_as_the_guest_selects_them() {
        let mut clock = clock();
        write(&mut clock, CONTROL_B, BINARY | HOURS_24, NOW);
        assert_eq!(time(&mut clock, NOW), [20, 26, 11, 28, 7, 14, 35, 7]);
        write(&mut clock, CONTROL_B, 0, NOW);
        let hours = [0, 1, 11, 12, 13, 23].map(|hour| {
            let at = NOW + (hour - 14) * 3600 * SECOND_US;
            read(&mut clock, HOURS, at)
        });
        assert_eq!(hours, [0x12, 0x01, 0x11, 0x92, 0x81, 0x91]);
    }

    #[test]
    fn the_time_that_a_guest_sets_goes_on_from_there_in_every_format() {
        for (format, hour) in [(HOURS_24, 0x23), (0, 0x91), (BINARY | HOURS_24, 23)] {
            let mut clock = clock();
            write(&mut clock, CONTROL_B, format | SET, NOW);
            let digits = |decimal: i64| number(decimal, format);
            for (index, value) in [
                (CENTURY, digits(19)),
                (YEAR, digits(99)),
                (MONTH, digits(12)),
                (DAY, digits(31)),
                (HOURS, hour),
                (MINUTES, digits(59)),
                (SECONDS, digits(58)),
            ] {
                write(&mut clock, index, value, NOW);
            }
            let later = NOW + 90 * SECOND_US;
            assert_eq!(read(&mut clock, SECONDS, later), digits(58), "it stands");
            assert_eq!(read(&mut clock, HOURS, later), hour);
            write(&mut clock, CONTROL_B, format, later);
            write(&mut clock, CONTROL_B, HOURS_24, later);
            let later = later + 2 * SECOND_US;
            assert_eq!(
                time(&mut clock, later),
                [0x20, 0x00, 0x01, 0x01, 7, 0, 0, 0],
                "{format:#x}"
            );
        }
    }

    #[test]
    fn a_single_register_of_a_running_clock_is_set_at_once() {
        let mut clock = clock();
        write(&mut clock, YEAR, 0x30, NOW);
        write(&mut clock, MINUTES, 0x59, NOW + SECOND_US / 3);
        let later = NOW + 60 * SECOND_US;
        let shown = time(&mut clock, later);
        assert_eq!(shown, [0x20, 0x30, 0x11, 0x28, 5, 0x15, 0x00, 0x07]);
    }

    #[test]
    fn the_first_update_comes_half_a_second_after_the_divider_left_its_reset() {
        let mut clock = clock();
        let now = NOW + 123_456;
        write(&mut clock, CONTROL_A, 0x76, now);
        write(&mut clock, SECONDS, 0x30, now);
        let later = now + 7 * SECOND_US;
        assert_eq!(read(&mut clock, SECONDS, later), 0x30);
        write(&mut clock, CONTROL_A, 0x26, later);
        assert_eq!(read(&mut clock, SECONDS, later + 499_999), 0x30);
        assert_eq!(read(&mut clock, SECONDS, later + 500_000), 0x31);
    }

    #[test]
    fn an_update_is_announced_for_244_microseconds_and_never_for_longer() {
        let mut clock = clock();
        for (within, expected) in [
            (0, 0),
            (500_000, 0),
            (999_755, 0),
            (999_756, UPDATE_IN_PROGRESS),
            (999_999, UPDATE_IN_PROGRESS),
            (1_000_000, 0),
        ] {
            let control = read(&mut clock, CONTROL_A, NOW + within);
            assert_eq!(control, CONTROL_A_START | expected, "{within}");
        }
        write(&mut clock, CONTROL_A, 0xA6, NOW);
        assert_eq!(read(&mut clock, CONTROL_A, NOW), 0x26, "read-only");
        write(&mut clock, CONTROL_B, SET | HOURS_24, NOW);
        assert_eq!(read(&mut clock, CONTROL_A, NOW + 999_999), 0x26, "stopped");
    }

    #[test]
    fn register_c_tells_once_that_the_time_was_updated() {
        let mut clock = clock();
        assert_eq!(read(&mut clock, FLAGS, NOW), UPDATE_ENDED);
        assert_eq!(read(&mut clock, FLAGS, NOW + 999_999), 0);
        assert_eq!(read(&mut clock, FLAGS, NOW + 1_000_000), UPDATE_ENDED);
        assert_eq!(read(&mut clock, FLAGS, NOW + 1_000_001), 0);
    }

    #[test]
    fn firmware_finds_the_size_of_the_memory() {
        let mut clock = clock();
        let mut word = |index| {
            let low = read(&mut clock, index, NOW);
            u16::from_le_bytes([low, read(&mut clock, index + 1, NOW)])
        };
        assert_eq!(word(0x15), 640);
        assert_eq!(word(0x17), 0xFFFF);
        assert_eq!(word(0x30), 0xFFFF);
        assert_eq!(word(0x34), 0xAF00);
        assert_eq!((word(0x5B), word(0x5C)), (0x4000, 0x0140));
        let small = RamSizes {
            low: 8 << 20,
            high: 0,
        };
        let mut small = Registers::new(small);
        assert_eq!(read(&mut small, 0x18, NOW), 0x1C);
        assert_eq!(read(&mut small, 0x35, NOW), 0);
    }

    #[test]
    fn memory_keeps_what_the_guest_writes() {
        let mut clock = clock();
        write(&mut clock, 0x0F, 0x0A, NOW);
        write(&mut clock, 0x7F, 0x55, NOW);
        assert_eq!(read(&mut clock, 0x0F, NOW), 0x0A);
        assert_eq!(read(&mut clock, 0xFF, NOW), 0x55);
    }
}
