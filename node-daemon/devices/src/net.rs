//! virtio-net (virtio 1.2, 5.1): one queue pair on a tap, and a control queue.
//!
//! The kernel implements the offloads: the virtio-net header passes through the tap unchanged in
//! both directions. After a migration, [`NetHandle::announce`] updates the switches and the
//! neighbours' ARP caches.
//!
//! Frames wait in the tap while the device is paused. Frames that arrived before a saved state is
//! restored are dropped, because the guest received them on the source. The device holds at most one
//! received frame, while the guest has no buffers for it; a migration loses that frame.

mod announce;
mod config;
mod device;
mod learned;
mod metrics;
mod queue_handler;
mod state;
mod tap;

pub use config::{MacAddress, NetConfig};
pub use device::{NetDevice, NetHandle};
pub use metrics::{NetCounts, NetMetrics};
pub use tap::{Tap, TapFd};
