//! What the machine may ask of any device.
//!
//! ```text
//!   made ──► running ⇄ paused ──► save
//!               ▲         ▲
//!               │         └────── restore   (a paused device that never ran)
//!               └── resume
//! ```
//! A device is made running; a destination pauses it before it restores a state into it.

use crate::state::{DeviceState, RestoreError};

/// The life of a device under its machine. Nothing here is called while a vCPU runs, except
/// [`Device::reset`].
pub trait Device: Send {
    /// The device's name in logs, metrics and failure reports, such as `blk0`.
    fn name(&self) -> &str;

    /// Quiesces the device.
    ///
    /// # Guarantees
    /// After it returned, until [`Device::resume`], the device neither reads nor writes guest
    /// memory, none of its I/O is in flight, and every page that it wrote is in the dirty bitmap.
    /// Requests that it had taken from the guest but could not submit (the write gate is closed)
    /// stay unanswered and are part of the saved state. Pausing a paused device does nothing.
    fn pause(&mut self);

    /// Goes on. A device that was restored re-reads its queues and interrupts the guest once on
    /// every queue, because notifications that were under way when it was saved are not part of the
    /// state.
    fn resume(&mut self);

    /// The state of a paused device.
    ///
    /// # Panics
    /// When the device is not paused: its state would be torn.
    fn save(&self) -> DeviceState;

    /// Takes over a saved state. The device must be paused, and made with the same configuration
    /// as the one that was saved.
    ///
    /// # Errors
    /// [`RestoreError`] when the state is of another kind, of an unknown version, or does not fit
    /// this device. The device is then unusable and must be dropped.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError>;

    /// Puts the device back to how it was made: a guest reboot.
    fn reset(&mut self);
}
