//! virtio-rng (virtio 1.2, 5.4): random bytes from the host kernel (`getrandom`).

mod config;
mod device;
mod metrics;
mod queue_handler;
mod state;

pub use config::RngConfig;
pub use device::RngDevice;
pub use metrics::{RngCounts, RngMetrics};
