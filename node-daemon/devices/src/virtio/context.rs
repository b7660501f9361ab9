//! What every virtio device needs from the VMM.

use std::sync::Arc;

use crate::doorbell::DoorbellRegistry;
use crate::failure::FailureSink;
use crate::guest_ram::GuestRam;
use crate::interrupt::MsiRouter;

/// What every virtio device needs from the VMM.
#[derive(Clone, Debug)]
pub struct DeviceContext {
    /// Guest memory.
    pub ram: Arc<GuestRam>,
    /// Interrupts to the guest.
    pub msi: Arc<dyn MsiRouter>,
    /// Queue notifications from the guest.
    pub doorbells: Arc<dyn DoorbellRegistry>,
    /// Receives the device's failure reports.
    pub failures: Arc<dyn FailureSink>,
}
