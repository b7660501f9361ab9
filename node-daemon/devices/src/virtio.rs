//! Virtio over PCI (virtio 1.2, modern only): what all virtio devices share.
//!
//! ```text
//!  vCPU threads                                  device thread
//!  function ── registers ── activate/reset/… ──► worker ── queue handler (blk, net, rng)
//!     │            └ MSI-X table ◄── interrupts ──┘   ▲
//!     └ notify write ──► kick eventfd ────────────────┘  (or directly from KVM by ioeventfd)
//! ```
//! The *function* ([`VirtioFunction`]) owns the registers. The *worker* is the device's thread: it
//! owns the virtqueues, and no other thread touches guest memory for the device. The two share
//! interrupts, the device-specific configuration and the DEVICE_NEEDS_RESET bit.
//!
//! When a guest violates the rules of a virtqueue, the device stops: it sets DEVICE_NEEDS_RESET and
//! reports a failure that names the rule. No action of a guest causes a panic.

mod chain;
pub(crate) mod constants;
mod context;
mod function;
pub(crate) mod layout;
mod queue;
pub(crate) mod queue_handler;
mod registers;
pub(crate) mod shared;
mod worker;

pub use chain::{Chain, ChainError, Segment, Segments};
pub use context::DeviceContext;
pub use function::VirtioFunction;
pub use queue::{QueueError, QueueSetup, Virtqueue};
