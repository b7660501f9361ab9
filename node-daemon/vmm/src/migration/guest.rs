//! How a migration thread handles the machine, which stays with the VM actor.

use bascule_types::Ownership;

/// The machine at the source. Every call may be refused when the guest was stopped meanwhile; the
/// attempt then ends.
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

    /// Runs the guest unless it runs, in `ownership` if the attempt began a new one. Called before any
    /// clean-up when an attempt fails.
    ///
    /// # Errors
    /// When there is no guest any more.
    fn resume(&mut self, ownership: Option<Ownership>) -> Result<(), GuestError>;

    /// The commit request is about to be sent: from now on only the outcome of the attempt may
    /// resume or stop the paused guest.
    ///
    /// # Errors
    /// When the guest is not paused any more: the commit request is then not sent.
    fn mark_in_doubt(&mut self) -> Result<(), GuestError>;
}

/// Why a step was refused or failed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct GuestError(pub String);

/// The machine at the destination.
pub trait Arrival {
    /// Restores the encoded state. The machine's memory is complete.
    ///
    /// # Errors
    /// When it does not fit; the machine cannot be used again.
    fn restore(&mut self, state: &[u8]) -> Result<(), GuestError>;

    /// This node owns the VM: opens the volume for writing. Repeated until it succeeds, because no other
    /// node may run the guest any more.
    ///
    /// # Errors
    /// Why it cannot be done now.
    fn take_over(&mut self, ownership: Ownership) -> Result<(), GuestError>;

    /// Announces the guest's addresses to the network. Called before the guest runs and once after.
    fn announce(&mut self);

    /// Runs the guest.
    ///
    /// # Errors
    /// When the machine failed.
    fn run(&mut self) -> Result<(), GuestError>;
}
