//! Interrupts to the guest, as message-signalled interrupts (PCI Local Bus 3.0, 6.8).

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

/// An entry of the hypervisor's interrupt routing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gsi(pub u32);

/// What a message-signalled interrupt writes, and where: the guest's choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsiMessage {
    /// The address, on x86 in `0xFEE0_0000..0xFEF0_0000`.
    pub address: u64,
    /// The value.
    pub data: u32,
}

/// The hypervisor's interrupt routing. A device allocates one GSI per MSI-X vector when it is made,
/// attaches one eventfd to each, and changes routes as the guest programs its MSI-X table. Masks
/// are the device's own affair: it writes the eventfd only of an unmasked vector.
///
/// GSI numbers are a host's own and are not part of any saved state.
pub trait MsiRouter: Send + Sync + fmt::Debug {
    /// A GSI that nobody else uses, with no route yet.
    ///
    /// # Errors
    /// When the table is full.
    fn allocate_gsi(&self) -> io::Result<Gsi>;

    /// Makes `gsi` deliver `message` from now on.
    ///
    /// # Errors
    /// When the hypervisor refuses it.
    fn set_route(&self, gsi: Gsi, message: MsiMessage) -> io::Result<()>;

    /// Makes every write to `irqfd` raise `gsi`, for the life of the machine.
    ///
    /// # Errors
    /// When the hypervisor refuses it.
    fn attach_irqfd(&self, gsi: Gsi, irqfd: &EventFd) -> io::Result<()>;
}
