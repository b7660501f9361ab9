//! The life cycle of a device, as the VMM drives it.
//!
//! # States
//! ```text
//!   made ──► running ⇄ paused ──► save
//!               ▲         ▲
//!               │         ├────── restore   (a paused device that never ran)
//!               │         └────── reset     (as it was made)
//!               └── resume
//! ```
//! A new device is running; the destination of a migration pauses it before it restores a state.

use bascule_types::WriterState;

use crate::state::{DeviceState, RestoreError};

/// The life cycle of a device. No method is called while vCPUs run, but the first [`Device::pause`].
pub trait Device: Send {
    /// The device's name in logs, metrics and failure reports, such as `blk0`.
    fn name(&self) -> &str;

    /// Quiesces the device.
    ///
    /// # Guarantees
    /// From its return until [`Device::resume`] the device neither reads nor writes guest memory,
    /// has no I/O in flight, and every page that it wrote is in the dirty bitmap. Requests that it
    /// had popped from the queue but could not submit, because the write gate is closed, stay
    /// incomplete and are part of the saved state. Pausing a paused device does nothing.
    ///
    /// Returns whether every write of the device has succeeded. No I/O in flight does not mean
    /// that: a write that failed may still land after an unclean device has paused.
    fn pause(&mut self) -> WriterState;

    /// Continues after [`Device::pause`]. A restored device re-reads its queues and interrupts the
    /// guest once for every queue, because notifications that were in flight when it was saved are
    /// not part of the state.
    fn resume(&mut self);

    /// The state of a paused device.
    ///
    /// # Panics
    /// When the device is not paused: its state would be inconsistent.
    fn save(&self) -> DeviceState;

    /// Loads a saved state. The device must be paused and have the same configuration as the
    /// saved one.
    ///
    /// # Errors
    /// [`RestoreError`] when the state is of another kind, of an unknown version, or does not fit
    /// this device. The device is then unusable and must be dropped.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError>;

    /// Returns the device to its initial state: a reset of the machine. Requests that wait are dropped
    /// without an answer. Called while the device is paused, or runs and its driver is quiet.
    ///
    /// # Guarantees
    /// A paused device then saves what it would have saved right after it was made, and offers the same to
    /// its driver. What may still land of its writes is not forgotten: it pauses unclean as before.
    fn reset(&mut self);
}
