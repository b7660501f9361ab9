//! The pvpanic device (QEMU, docs/specs/pvpanic.rst) at its I/O port: a guest's kernel writes one byte there when it
//! panics. Linux' driver `pvpanic-mmio` finds the port by the ACPI device `QEMU0001`.
//!
//! A read tells which events the device knows. It does not offer to take a shutdown, which a guest requests by the ACPI
//! sleep register.
//!
//! An event counts once until the machine is reset, and a crash kernel may panic itself: a guest that writes without end is
//! heard twice. What is known of a guest's panics moves with it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bascule_ipc::vm::{Panic, PanicStatus};

/// A panic has happened, and the host is to handle it.
const PANICKED: u8 = 1 << 0;
/// A panic has happened, and the guest handles it.
const CRASH_LOADED: u8 = 1 << 1;

/// Called with each new panic, on the thread of a vCPU; must not block.
pub(crate) type OnPanicked = Arc<dyn Fn(Panic) + Send + Sync>;

/// The device. Shared by all vCPU threads.
pub(crate) struct Pvpanic {
    panics: Mutex<PanicStatus>,
    on_panicked: OnPanicked,
}

impl Pvpanic {
    /// What a guest reads: the events that the device knows.
    pub(crate) const KNOWN: u8 = PANICKED | CRASH_LOADED;

    /// Of a guest that has not panicked yet.
    pub(crate) fn new(on_panicked: OnPanicked) -> Self {
        Self {
            panics: Mutex::default(),
            on_panicked,
        }
    }

    /// Guest write of events. Those that the device does not know are ignored; a panic that the host is to handle comes
    /// before one that it is not.
    pub(crate) fn write(&self, events: u8) {
        let panic = match events {
            _ if events & PANICKED != 0 => Panic::Panicked,
            _ if events & CRASH_LOADED != 0 => Panic::CrashLoaded,
            _ => return,
        };
        let is_new = {
            let mut panics = self.lock();
            // A guest that goes no further cannot have a crash kernel after that.
            let is_new = match panics.present {
                None => true,
                Some(present) => (present, panic) == (Panic::CrashLoaded, Panic::Panicked),
            };
            if is_new {
                panics.present = Some(panic);
                panics.count = panics.count.saturating_add(1);
            }
            is_new
        };
        if is_new {
            (self.on_panicked)(panic);
        }
    }

    /// A reset: the guest is in no panic any more. Their number stays.
    pub(crate) fn reset(&self) {
        self.lock().present = None;
    }

    /// What is known of the guest's panics.
    pub(crate) fn status(&self) -> PanicStatus {
        *self.lock()
    }

    /// Restores what was known where the guest comes from; every value is possible.
    pub(crate) fn restore(&self, panics: PanicStatus) {
        *self.lock() = panics;
    }

    fn lock(&self) -> MutexGuard<'_, PanicStatus> {
        self.panics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Pvpanic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Pvpanic").field(&self.status()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    fn device() -> (Pvpanic, Receiver<Panic>) {
        let (told_tx, told_rx) = channel();
        let device = Pvpanic::new(Arc::new(move |panic| told_tx.send(panic).unwrap()));
        (device, told_rx)
    }

    fn told(told_rx: &Receiver<Panic>) -> Vec<Panic> {
        told_rx.try_iter().collect()
    }

    fn status(count: u32, present: Option<Panic>) -> PanicStatus {
        PanicStatus { count, present }
    }

    #[test]
    fn pvpanic_a_read_has_the_bits_of_both_panics_and_not_that_of_a_shutdown() {
        assert_eq!(Pvpanic::KNOWN, 0b011);
    }

    #[test]
    fn pvpanic_bits_that_are_not_known_are_ignored() {
        let (device, told_rx) = device();
        for event in [0, 0b100, 0b1111_1100] {
            device.write(event);
        }
        assert_eq!((device.status(), told(&told_rx)), (status(0, None), vec![]));
        device.write(0b1000_0001);
        let panicked = Panic::Panicked;
        assert_eq!(device.status(), status(1, Some(panicked)));
        assert_eq!(told(&told_rx), [panicked]);
    }

    #[test]
    fn pvpanic_a_panic_that_the_host_handles_comes_before_one_that_the_guest_handles() {
        let (device, told_rx) = device();
        device.write(0b11);
        assert_eq!(told(&told_rx), [Panic::Panicked]);
    }

    /// Each event is work of the VM's actor.
    #[test]
    fn a_guest_that_writes_without_end_is_heard_twice_between_two_resets() {
        let (device, told_rx) = device();
        for _ in 0..100 {
            device.write(2);
        }
        for _ in 0..100 {
            device.write(1);
            device.write(2);
        }
        let both = [Panic::CrashLoaded, Panic::Panicked];
        assert_eq!(told(&told_rx), both);
        assert_eq!(device.status(), status(2, Some(Panic::Panicked)));
        device.reset();
        assert_eq!(device.status(), status(2, None));
        device.write(1);
        device.write(2);
        assert_eq!(told(&told_rx), [Panic::Panicked]);
        assert_eq!(device.status(), status(3, Some(Panic::Panicked)));
    }

    #[test]
    fn a_guest_that_moves_while_it_is_panicked_is_so_at_its_destination_and_not_heard_again() {
        let (old, _told_rx) = device();
        old.write(1);
        let (new, told_rx) = device();
        new.restore(old.status());
        assert_eq!(new.status(), status(1, Some(Panic::Panicked)));
        new.write(1);
        assert_eq!((new.status().count, told(&told_rx)), (1, vec![]));
        new.restore(status(u32::MAX, None));
        new.write(1);
        assert_eq!(new.status().count, u32::MAX);
    }
}
