//! A static value with a mutable reference that can be taken once.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

/// A value in static memory; the first `take` gets it.
pub(crate) struct Once<T> {
    value: UnsafeCell<T>,
    taken: AtomicBool,
}

// SAFETY: the guest has one thread, and `take` hands the value out at most once.
unsafe impl<T> Sync for Once<T> {}

impl<T> Once<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self {
            value: UnsafeCell::new(value),
            taken: AtomicBool::new(false),
        }
    }

    /// The value; `None` when it was taken before.
    #[expect(
        clippy::mut_from_ref,
        reason = "handing out the only reference is the purpose"
    )]
    pub(crate) fn take(&'static self) -> Option<&'static mut T> {
        if self.taken.swap(true, Ordering::Relaxed) {
            return None;
        }
        // SAFETY: this is reached once, so this is the only reference.
        Some(unsafe { &mut *self.value.get() })
    }
}
