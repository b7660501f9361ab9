//! virtio-net (virtio 1.2, 5.1): one queue pair on a tap, and a control queue.
//!
//! Offloads are the kernel's: the virtio-net header goes through the tap unchanged in both
//! directions. After a move, [`NetHandle::announce`] tells the network where the guest is now.
//!
//! Frames wait in the tap while the device is paused; those that came before a saved state is
//! restored are dropped, since the guest has seen them where it was. At most one received frame is held here,
//! for want of buffers; a migration loses it, as a network may lose any frame.

mod announce;
mod config;
mod device;
mod metrics;
mod queue_handler;
mod state;
mod tap;

pub use config::{MacAddress, NetConfig};
pub use device::{NetDevice, NetHandle};
pub use metrics::{NetCounts, NetMetrics};
pub use tap::{Tap, TapFd};
