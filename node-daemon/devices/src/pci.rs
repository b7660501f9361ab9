//! The PCI bus of a virtual machine: bus 0, one root, functions that are added before the guest runs.
//!
//! The guest reaches configuration space by mechanism #1 (ports `0xCF8`/`0xCFC`) and by ECAM, and
//! the functions' registers by memory BARs, which are assigned when a function is added and which
//! the guest may move. Memory decoding and bus mastering are on from the start, so that a guest
//! without any PCI set-up code finds usable devices.
//!
//! Not implemented, because no device needs them: bridges, I/O BARs, 64-bit BARs, INTx, multi-function
//! devices, hot-plug.

mod address;
mod config;
mod function;
mod host_bridge;
mod msix;
mod root;

pub use address::{DeviceNumber, PciAddress};
pub use config::{BAR_COUNT, ConfigSpace, ConfigState, Identity};
pub use function::{BarRegion, PciFunction};
pub use msix::{Msix, MsixState};
pub use root::{AddError, PciRoot};
