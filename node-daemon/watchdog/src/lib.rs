//! The owner of a node's watchdog: pets the device only while every volume with an open writer
//! has a valid lease.
//!
//! ```text
//!   bascule-volume ──Enlist, Withdraw──► server ──► registry ◄── petting loop ──pet──► device
//!                                                     │  ▲
//!                                      watchdog.json ◄┘  └── gate pages (read-only)
//! ```
//!
//! # Guarantees
//! - A volume stays enlisted until it is withdrawn: through the end of the client's connection, the
//!   client's crash, and a restart of this process (`watchdog.json` beside the socket, bound to the
//!   boot). A client that is gone renews nothing, its lease lapses, and the pets end.
//! - The device is disarmed only on request and only while nothing is enlisted. When this process
//!   ends in any other way the device counts on.
//! - The kernel's softdog is refused unless it was allowed: it hangs with its kernel.
//!
//! The decision itself is [`bascule_volume_protocol::watchdog_policy`]. Read next: [`Registry`], then
//! [`petting`] and [`server`].

mod device;
mod linux;
mod persist;
pub mod petting;
mod registry;
pub mod server;

pub use device::{Kind, NoDevice, PipeDevice, WatchdogDevice};
pub use linux::LinuxDevice;
pub use persist::{PersistError, Store};
pub use registry::{EnlistRefused, Registry};
