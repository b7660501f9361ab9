//! Doorbells: queue notifications of the guest that wake the device's thread inside the kernel,
//! without an exit to the VMM (ioeventfd).
//!
//! Doorbells are an optimisation. A device accepts the same write through
//! [`crate::pci::PciRoot::mmio_write`] as well, so a registry may refuse all of them.

use std::fmt;
use std::io;

use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// Registers doorbells with the hypervisor (KVM: ioeventfd on MMIO, any access size). Each virtqueue
/// has its own address, so no data match is needed.
pub trait DoorbellRegistry: Send + Sync + fmt::Debug {
    /// Signals `doorbell` at every guest write to `address`.
    ///
    /// # Errors
    /// When the hypervisor refuses; notifications of the queue then cause MMIO exits.
    fn register(&self, doorbell: &EventFd, address: GuestAddress) -> io::Result<()>;

    /// Undoes [`DoorbellRegistry::register`] with the same arguments.
    ///
    /// # Errors
    /// When that pair is not registered.
    fn unregister(&self, doorbell: &EventFd, address: GuestAddress) -> io::Result<()>;
}

/// Refuses every doorbell: all notifications cause MMIO exits.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoDoorbells;

impl DoorbellRegistry for NoDoorbells {
    fn register(&self, _doorbell: &EventFd, _address: GuestAddress) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn unregister(&self, _doorbell: &EventFd, _address: GuestAddress) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
