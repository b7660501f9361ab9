//! What every virtio device needs from the VMM.

use std::sync::Arc;

use crate::failure::FailureSink;
use crate::guest_ram::GuestRam;
use crate::interrupt::MsiRouter;
use crate::ioeventfd::IoeventfdRegistry;

/// What every virtio device needs from the VMM.
#[derive(Clone, Debug)]
pub struct DeviceContext {
    /// Guest memory.
    pub ram: Arc<GuestRam>,
    /// Interrupts to the guest.
    pub msi: Arc<dyn MsiRouter>,
    /// Queue notifications from the guest.
    pub ioeventfds: Arc<dyn IoeventfdRegistry>,
    /// Receives the device's failure reports.
    pub failures: Arc<dyn FailureSink>,
}
