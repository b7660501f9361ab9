//! The guest's clock: the TSC alone, so that its value after a migration is the one that the VMM
//! restored.

use core::arch::x86_64::{__cpuid, _rdtsc};

use crate::port;

/// A clock that starts at 0 when it is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    start: u64,
    /// Microseconds per count, as a fraction of 2^32.
    scale: u64,
    /// The frequency in kHz.
    pub(crate) khz: u64,
}

impl Clock {
    /// The clock. `known_khz` is the TSC's frequency from the command line; without it the
    /// hypervisor's CPUID leaf or a measurement gives the frequency.
    pub(crate) fn new(known_khz: Option<u64>) -> Self {
        let khz = known_khz
            .or_else(hypervisor_khz)
            .or_else(|| Some(measured_khz()).filter(|khz| PLAUSIBLE_KHZ.contains(khz)))
            .unwrap_or(FALLBACK_KHZ);
        Self {
            start: counter(),
            scale: (1000 << 32) / khz,
            khz,
        }
    }

    /// Microseconds since the clock was made.
    pub(crate) fn now_us(&self) -> u64 {
        let counts = counter().wrapping_sub(self.start);
        ((u128::from(counts) * u128::from(self.scale)) >> 32) as u64
    }
}

pub(crate) fn counter() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and CR4.TSD is clear.
    unsafe { _rdtsc() }
}

/// CPUID leaf 0x40000010 (the timing leaf that KVM guests may be given): kHz in EAX.
fn hypervisor_khz() -> Option<u64> {
    let highest = __cpuid(0x4000_0000).eax;
    if !(0x4000_0010..0x4001_0000).contains(&highest) {
        return None;
    }
    let khz = u64::from(__cpuid(0x4000_0010).eax);
    PLAUSIBLE_KHZ.contains(&khz).then_some(khz)
}

/// The second smallest of several short measurements. A host that takes the processor away makes a
/// measurement too long, and only in one short moment, at its start, too short.
fn measured_khz() -> u64 {
    let mut measured = [0; PIT_RUNS];
    for khz in &mut measured {
        *khz = measured_once_khz();
    }
    measured.sort_unstable();
    measured[1]
}

/// Counts while channel 2 of the programmable interval timer counts down (Intel 8254 data sheet).
fn measured_once_khz() -> u64 {
    port::write8(PIT_GATE, (port::read8(PIT_GATE) & !2) | 1);
    port::write8(PIT_COMMAND, 0xb0);
    port::write8(PIT_CHANNEL_2, (PIT_COUNT & 0xff) as u8);
    port::write8(PIT_CHANNEL_2, (PIT_COUNT >> 8) as u8);
    let start = counter();
    let mut reads_left = PIT_READS_MAX;
    while port::read8(PIT_GATE) & 0x20 == 0 && reads_left > 0 {
        reads_left -= 1;
    }
    counter().wrapping_sub(start) / PIT_MS
}

const PLAUSIBLE_KHZ: core::ops::Range<u64> = 500_000..10_000_000;
/// Wrong, but the guest goes on: its times are then off by a constant factor.
const FALLBACK_KHZ: u64 = 2_000_000;
const PIT_GATE: u16 = 0x61;
const PIT_COMMAND: u16 = 0x43;
const PIT_CHANNEL_2: u16 = 0x42;
const PIT_RUNS: usize = 9;
const PIT_MS: u64 = 10;
/// 10 ms at 1,193,182 Hz.
const PIT_COUNT: u16 = 11_932;
/// A guess at "the timer does not run": each read costs at least a microsecond.
const PIT_READS_MAX: u32 = 50_000;
