//! Ioeventfds: queue notifications of the guest (doorbells) that the kernel turns into a wake-up of the
//! device's thread, without an exit to the VMM.
//!
//! Ioeventfds are an optimisation. A device accepts the same write through
//! [`crate::pci::PciRoot::mmio_write`] as well, so a registry may refuse all of them.

use std::fmt;
use std::io;

use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// Registers ioeventfds with the hypervisor (KVM: ioeventfd on MMIO, any access size). Each virtqueue
/// has its own address, so no data match is needed.
pub trait IoeventfdRegistry: Send + Sync + fmt::Debug {
    /// Signals `ioeventfd` at every guest write to `address`.
    ///
    /// # Errors
    /// When the hypervisor refuses; notifications of the queue then cause MMIO exits.
    fn register(&self, ioeventfd: &EventFd, address: GuestAddress) -> io::Result<()>;

    /// Undoes [`IoeventfdRegistry::register`] with the same arguments.
    ///
    /// # Errors
    /// When that pair is not registered.
    fn unregister(&self, ioeventfd: &EventFd, address: GuestAddress) -> io::Result<()>;
}

/// Refuses every ioeventfd: all notifications cause MMIO exits.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoIoeventfds;

impl IoeventfdRegistry for NoIoeventfds {
    fn register(&self, _ioeventfd: &EventFd, _address: GuestAddress) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn unregister(&self, _ioeventfd: &EventFd, _address: GuestAddress) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
