//! Virtio over PCI (virtio 1.2, modern only): what all our virtio devices share.
//!
//! ```text
//!  vCPU threads                                  device thread
//!  function ── registers ── activate/reset/… ──► worker ── queue handler (blk, net, rng)
//!     │            └ MSI-X table ◄── interrupts ──┘   ▲
//!     └ notify write ──► kick eventfd ────────────────┘  (or straight from KVM: doorbell)
//! ```
//! The *function* ([`VirtioFunction`]) owns the registers. The *worker* is the device's thread: it
//! owns the queues, and is the only one that touches guest memory. They share interrupts, the
//! device-specific configuration and the NEEDS_RESET bit.
//!
//! A guest that breaks a queue's rules loses the device: NEEDS_RESET is set and a failure with the
//! rule's name is reported. Nothing that a guest does panics here.

mod chain;
pub(crate) mod function;
pub(crate) mod layout;
mod queue;
pub(crate) mod registers;
pub(crate) mod shared;
pub(crate) mod worker;

use std::sync::Arc;

pub use chain::{Chain, ChainError, Segment, Segments};
pub use function::VirtioFunction;
pub use queue::{QueueError, QueueSetup, Virtqueue};

use crate::GuestRam;
use crate::doorbell::DoorbellRegistry;
use crate::failure::FailureSink;
use crate::interrupt::MsiRouter;

/// What every virtio device needs of its machine.
#[derive(Clone, Debug)]
pub struct DeviceContext {
    /// Guest memory.
    pub ram: Arc<GuestRam>,
    /// Interrupts to the guest.
    pub msi: Arc<dyn MsiRouter>,
    /// Doorbells from the guest.
    pub doorbells: Arc<dyn DoorbellRegistry>,
    /// Where failures are reported.
    pub failures: Arc<dyn FailureSink>,
}

/// The vector number that stands for "no interrupt" (4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xFFFF;

/// `VIRTIO_F_INDIRECT_DESC` (6).
pub(crate) const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX` (6).
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1` (6).
pub(crate) const F_VERSION_1: u64 = 1 << 32;
