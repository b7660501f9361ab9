//! `bascule-watchdog`: the one process of a node that owns the node's watchdog device. It sends
//! keepalives only while every volume with an open writer has a valid lease; otherwise the watchdog
//! resets the node.
//!
//! ```text
//!   bascule-volume ──Enlist, Withdraw──► server ──► EnlistedVolumes ◄── keepalive loop ──► device
//!                                                     │  ▲
//!                                      watchdog.json ◄┘  └── gate pages (read-only)      ▲
//!                                                                    holder ──descriptor──┘
//! ```
//!
//! # Guarantees
//! - A volume stays enlisted until it is withdrawn, even if the client disconnects, the client
//!   crashes, or this process restarts (`watchdog.json` beside the socket, bound to the boot). The
//!   lease of a dead client is not renewed, so it expires and the keepalives stop.
//! - A process that starts pets nothing before it has decided. It takes the open device from the holder
//!   ([`Holder`], a second process); if there is none, it opens the device only once every enlisted
//!   lease is valid (`docs/adr/0007-watchdog-adoption.md`).
//! - The device is disarmed only on request, or after SIGTERM, and only while no volume is enlisted. Until
//!   then SIGTERM, which a host's shutdown sends to every process, has no effect: guests may be shutting
//!   down. When this process ends in any other way, the device stays armed and its timeout keeps running.
//! - The kernel's softdog is refused unless it was allowed: it hangs with its kernel.
//!
//! The decision itself is [`bascule_volume_protocol::watchdog_policy`]. Read next:
//! [`EnlistedVolumes`], then [`keepalive`] and [`server`].

mod device_slot;
mod enlisted_volumes;
mod enlistment_store;
mod held_device;
mod holder;
mod host;
pub mod keepalive;
mod linux_watchdog;
pub mod server;
pub mod shutdown_signal;
mod watchdog_device;

pub use device_slot::{Opener, SlotError, device_slot};
pub use enlisted_volumes::{EnlistRefused, EnlistedVolumes};
pub use enlistment_store::{EnlistmentFile, EnlistmentStore, StoreError};
pub use held_device::HeldDevice;
pub use holder::{Holder, HolderError, HolderProcess, hold};
pub use host::{BoxedDevice, FoundHolder, Host, LinuxHost, Watchdog};
pub use linux_watchdog::{Driver, LinuxDevice, LinuxDriver};
pub use watchdog_device::{Kind, NoDevice, PipeDevice, WatchdogDevice};
