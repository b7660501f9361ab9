//! The write gate: the check that every write passes right before its submission.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bascule_types::{Owner, WriterState};
use bascule_volume_gate::{Clock, GateClosedReason, GateReader, LinuxClock, WriterPage};

/// Decides whether writes may be submitted at this moment.
pub trait WriteGate: Send + Sync + fmt::Debug {
    /// Called right before each submission of a batch that has writes, and every few milliseconds while writes wait.
    fn is_open(&self) -> bool;

    /// A thread is about to check the gate for a write. Once per thread until
    /// [`WriteGate::writes_ended`].
    ///
    /// # Ordering
    /// Before [`WriteGate::is_open`] samples the clock ([`bascule_volume_gate::writer_page`]).
    fn write_begins(&self) {}

    /// None of that thread's writes is in flight.
    fn writes_ended(&self) {}

    /// A write or flush failed, or its outcome is unknown: it may land at any later time.
    fn write_failed(&self) {}
}

/// The gate of a disk that no other node can write: a plain file in embedded mode without a volume.
#[derive(Clone, Copy, Debug, Default)]
pub struct AlwaysOpen;

impl WriteGate for AlwaysOpen {
    fn is_open(&self) -> bool {
        true
    }
}

/// The gate of a volume, for one owner. The VMM replaces the owner when the node has rejoined the
/// volume in a new generation and kept the ownership of the virtual machine.
#[derive(Debug)]
pub struct VolumeGate<C: Clock = LinuxClock> {
    clock: C,
    reader: Arc<GateReader>,
    owner: Mutex<Owner>,
    /// None with a `bascule-volume` of an earlier release, which does not ask.
    page: Option<WriterPage>,
    unclean: AtomicBool,
}

impl VolumeGate {
    /// A gate that is open while the gate page of `reader` shows a valid lease of `owner`. What is
    /// under way is told in `page`.
    #[must_use]
    pub fn new(reader: Arc<GateReader>, owner: Owner, page: Option<WriterPage>) -> Self {
        Self::with_clock(LinuxClock, reader, owner, page)
    }
}

impl<C: Clock> VolumeGate<C> {
    /// The same on a clock of a simulation.
    #[must_use]
    pub fn with_clock(
        clock: C,
        reader: Arc<GateReader>,
        owner: Owner,
        page: Option<WriterPage>,
    ) -> Self {
        Self {
            clock,
            reader,
            owner: Mutex::new(owner),
            page,
            unclean: AtomicBool::new(false),
        }
    }

    /// Whether every write through this gate has succeeded so far. Never becomes clean again.
    pub fn writer_state(&self) -> WriterState {
        if self.unclean.load(Ordering::SeqCst) {
            WriterState::Unclean
        } else {
            WriterState::Clean
        }
    }

    /// Replaces the owner for all further checks.
    pub fn set_owner(&self, owner: Owner) {
        *self.owner.lock().unwrap_or_else(PoisonError::into_inner) = owner;
    }

    /// Why the gate is closed; `None` when it is open.
    #[must_use]
    pub fn closed_reason(&self) -> Option<GateClosedReason> {
        let owner = *self.owner.lock().unwrap_or_else(PoisonError::into_inner);
        let checked = self.reader.check(self.clock.now(), owner);
        checked.err().map(|closed| closed.reason)
    }
}

impl<C: Clock> WriteGate for VolumeGate<C> {
    fn is_open(&self) -> bool {
        self.closed_reason().is_none()
    }

    fn write_begins(&self) {
        if let Some(page) = &self.page {
            page.write_begins();
        }
    }

    fn writes_ended(&self) {
        if let Some(page) = &self.page {
            page.writes_ended();
        }
    }

    fn write_failed(&self) {
        self.unclean.store(true, Ordering::SeqCst);
        if let Some(page) = &self.page {
            page.write_failed();
        }
    }
}
