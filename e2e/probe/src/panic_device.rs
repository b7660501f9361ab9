//! The pvpanic device (QEMU, docs/specs/pvpanic.rst), as Linux' driver `pvpanic-mmio` uses it.

use crate::port;

/// What the device is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PanicEvent {
    /// The kernel goes no further.
    Panicked,
    /// A crash kernel goes on.
    CrashLoaded,
}

/// Tells the device, if it knows this event.
pub(crate) fn tell(event: PanicEvent) -> Option<()> {
    let bit = match event {
        PanicEvent::Panicked => 1,
        PanicEvent::CrashLoaded => 2,
    };
    // A port without a device reads as all ones.
    let known = Some(port::read8(PORT)).filter(|known| *known != 0xff)?;
    (known & bit != 0).then(|| port::write8(PORT, bit))
}

const PORT: u16 = 0x505;
