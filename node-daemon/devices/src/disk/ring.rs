//! Where an engine's commands are performed: vectored reads and writes, and data sync, on one file.
//!
//! [`UringRing`] is io_uring, and the only ring of a release. With the feature `fault-injection` there is a
//! second one, for simulations.

use std::fmt;
use std::io;
use std::time::Instant;

#[cfg(feature = "fault-injection")]
mod simulated;
mod uring;

#[cfg(feature = "fault-injection")]
pub use simulated::{DeviceCommand, SimulatedDevice, SimulatedRing, Transferred};
pub use uring::UringRing;

/// Performs commands on its file, in batches. Used by one thread.
///
/// # Ordering
/// Commands in flight at the same time take effect in any order.
pub trait Ring: fmt::Debug {
    /// Whether one more command can be pushed.
    fn has_room(&self) -> bool;

    /// Commands that were submitted and not reaped.
    fn in_flight(&self) -> usize;

    /// Adds a command to the next batch. Its completion carries `tag`.
    ///
    /// # Errors
    /// When the ring itself has failed, or has no room.
    ///
    /// # Safety
    /// The runs are memory that stays mapped until the completion is reaped, and no reference into them exists
    /// meanwhile. For a read it is writable memory.
    #[expect(unsafe_code, reason = "commands take raw addresses")]
    unsafe fn push(&mut self, command: Command<'_>, tag: u64) -> io::Result<()>;

    /// Submits the batch.
    ///
    /// # Errors
    /// When the ring itself fails. Which commands of the batch take effect is then unknown.
    fn submit(&mut self) -> io::Result<()>;

    /// The next completion that has been posted: its tag, and the bytes transferred.
    fn reap(&mut self) -> Option<(u64, io::Result<usize>)>;

    /// Takes back the signal that completions were posted, before they are reaped.
    fn acknowledge(&self);

    /// Waits until a completion is posted, if a command is in flight. Submits nothing.
    ///
    /// # Errors
    /// When the ring itself fails.
    fn wait(&mut self) -> io::Result<()>;

    /// The time by which the engine waits.
    fn now(&self) -> Instant;
}

/// A range of memory of this process, by its exposed address. Laid out as a `struct iovec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct HostRun {
    pub(super) address: usize,
    /// In bytes.
    pub(super) length: usize,
}

impl HostRun {
    /// The address and length of `bytes`.
    pub(super) fn of(bytes: &mut [u8]) -> Self {
        Self {
            address: bytes.as_mut_ptr().expose_provenance(),
            length: bytes.len(),
        }
    }
}

/// What to do on the file.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Command<'a> {
    /// Reads from `offset` on, to `runs` one after the other.
    Read { runs: &'a [HostRun], offset: u64 },
    /// Writes from `offset` on, from `runs` one after the other.
    Write {
        runs: &'a [HostRun],
        offset: u64,
        /// Completes only when the data is durable (`RWF_DSYNC`).
        durable: bool,
    },
    /// Makes what was written durable.
    Sync,
}
