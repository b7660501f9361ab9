//! The write gate of one disk: it closes and opens as the run says, and checks what it is told.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bascule_devices::disk::WriteGate;

#[derive(Debug)]
pub(crate) struct Gate {
    pub(crate) is_open: AtomicBool,
    active: AtomicUsize,
    failed: AtomicBool,
}

impl Gate {
    pub(crate) fn new() -> Self {
        Self {
            is_open: AtomicBool::new(true),
            active: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
        }
    }

    /// A write is being submitted.
    pub(crate) fn assert_open(&self) {
        assert!(
            self.is_open.load(Ordering::Relaxed),
            "I1: the gate is closed"
        );
        assert!(!self.is_idle(), "I1: the gate was not told");
    }

    /// No write may be in flight, as far as it was told.
    pub(crate) fn is_idle(&self) -> bool {
        self.active.load(Ordering::Relaxed) == 0
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }
}

impl WriteGate for Gate {
    fn is_open(&self) -> bool {
        self.is_open.load(Ordering::Relaxed)
    }

    fn write_begins(&self) {
        self.active.fetch_add(1, Ordering::Relaxed);
    }

    fn writes_ended(&self) {
        self.active.fetch_sub(1, Ordering::Relaxed);
    }

    fn write_failed(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }
}
