//! virtio-console (virtio 1.2, 5.3) with one named port, such as a guest's agent serves.
//!
//! The port is number 1: other hypervisors keep number 0 for a console, and drivers expect that. It has no console, so
//! nothing passes through the queues of port 0. The host's end of the port is a [`HostPort`]; from the host's side the
//! port is open for as long as the device exists.
//!
//! # Guarantees
//! The device holds at most 4 KiB for the guest and no byte of the guest's: output that the host does not take stays in
//! the guest's queue, and its driver waits. What the guest can have the device answer is bounded too: with 16 control
//! messages waiting for buffers, further requests wait.
//!
//! Bytes for the guest that wait in the device or in the [`HostPort`] do not move with the guest: whoever speaks
//! through the port at the destination begins its protocol anew.

mod config;
mod device;
mod port;
mod queue_handler;
mod state;

pub use config::ConsoleConfig;
pub use device::ConsoleDevice;
pub use port::HostPort;
