//! How a migration handles a machine that stays with its owner.

use bascule_types::Ownership;

/// The machine, as whoever owns it lets a migration handle it. Every call may be refused when the
/// guest was stopped meanwhile; the attempt then ends.
pub trait Guest {
    /// Parks the vCPUs and drains the devices.
    ///
    /// # Errors
    /// When the guest does not run, or the machine failed.
    fn pause(&mut self) -> Result<(), GuestError>;

    /// The state of the paused machine, encoded.
    ///
    /// # Errors
    /// When it is not paused, or KVM refuses.
    fn save(&mut self) -> Result<Vec<u8>, GuestError>;

    /// Lets the guest run if it does not. Called first whenever an attempt fails.
    ///
    /// # Errors
    /// When there is no guest any more.
    fn resume(&mut self) -> Result<(), GuestError>;

    /// The commit request is about to be sent: from now on only the outcome of the attempt may
    /// resume or stop the paused guest.
    ///
    /// # Errors
    /// When the guest is not paused any more: nothing is then asked for.
    fn mark_in_doubt(&mut self) -> Result<(), GuestError>;
}

/// Why the machine's owner did not do what a migration wanted.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct GuestError(pub String);

/// The machine that is to arrive, as whoever owns it lets a migration handle it.
pub trait Arrival {
    /// Puts the encoded state into the machine, whose memory is complete.
    ///
    /// # Errors
    /// When it does not fit; the machine is then of no more use.
    fn restore(&mut self, state: &[u8]) -> Result<(), GuestError>;

    /// The row is this node's: opens the volume for writing. Asked again until it succeeds,
    /// because nobody else may run the guest any more.
    ///
    /// # Errors
    /// Why it cannot be done now.
    fn take_over(&mut self, ownership: Ownership) -> Result<(), GuestError>;

    /// Tells the network where the guest is now. Called before the guest runs and once after.
    fn announce(&mut self);

    /// Lets the guest run.
    ///
    /// # Errors
    /// When the machine failed.
    fn run(&mut self) -> Result<(), GuestError>;
}
