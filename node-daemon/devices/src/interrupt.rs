//! Interrupts to the guest, as message-signalled interrupts (PCI Local Bus 3.0, 6.8).

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

/// An entry of the hypervisor's interrupt routing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gsi(pub u32);

/// Address and data of a message-signalled interrupt, as the guest programmed them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsiMessage {
    /// On x86 in `0xFEE0_0000..0xFEF0_0000`.
    pub address: u64,
    /// On x86 the vector number and the delivery mode.
    pub data: u32,
}

/// The hypervisor's interrupt routing. A device allocates one GSI per MSI-X vector when it is made,
/// attaches one eventfd to each, and changes routes as the guest programs its MSI-X table. The
/// device implements the masks: it writes the eventfd of an unmasked vector only.
///
/// GSI numbers differ between hosts and are not part of any saved state.
pub trait MsiRouter: Send + Sync + fmt::Debug {
    /// Allocates an unused GSI, without a route.
    ///
    /// # Errors
    /// When the routing table is full.
    fn allocate_gsi(&self) -> io::Result<Gsi>;

    /// Routes `gsi` to `message`, replacing the previous route.
    ///
    /// # Errors
    /// When the hypervisor refuses.
    fn set_route(&self, gsi: Gsi, message: MsiMessage) -> io::Result<()>;

    /// Makes every write to `irqfd` raise `gsi`, until the virtual machine ends.
    ///
    /// # Errors
    /// When the hypervisor refuses.
    fn attach_irqfd(&self, gsi: Gsi, irqfd: &EventFd) -> io::Result<()>;
}
