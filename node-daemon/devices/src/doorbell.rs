//! Doorbells: guest writes that wake a device's thread without leaving the kernel.
//!
//! They are an acceleration only. A device also takes the same write through
//! [`crate::pci::PciRoot::mmio_write`], so a registry may refuse all of them.

use std::fmt;
use std::io;

use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// The hypervisor's table of doorbells (on KVM: ioeventfd on MMIO, any access size). Each virtqueue
/// has an address of its own, so no data match is needed.
pub trait DoorbellRegistry: Send + Sync + fmt::Debug {
    /// Signals `doorbell` at every guest write to `address`.
    ///
    /// # Errors
    /// When the hypervisor refuses it; the device then works through MMIO exits.
    fn register(&self, doorbell: &EventFd, address: GuestAddress) -> io::Result<()>;

    /// Undoes [`DoorbellRegistry::register`] with the same arguments.
    ///
    /// # Errors
    /// When the hypervisor does not know that pair.
    fn unregister(&self, doorbell: &EventFd, address: GuestAddress) -> io::Result<()>;
}

/// Refuses every doorbell: all notifications then take the MMIO exit.
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
