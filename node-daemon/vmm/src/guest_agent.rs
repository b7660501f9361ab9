//! The client of the agent in the guest: `qemu-ga`, as distributions have it, behind the port of a virtio-console device.
//!
//! ```text
//!   guest's agent ◄─► virtio-console's thread ◄─ socket pair ─► client's thread ──► status, power button
//! ```
//! The client speaks the agent's protocol (JSON lines; QEMU's `docs/interop/qemu-ga`) when the guest has the port open: it
//! asks for what the status shows, tells the guest the time after its memory was restored, and tells it to shut down.
//!
//! # Assumes
//! Nothing of the guest: whoever controls it writes what he likes. Each exchange has a time limit and a limit on the bytes
//! that are read, one exchange is under way at a time, and polls are a fixed pause apart. Between exchanges nothing is
//! read, so that a guest that goes on writing waits. A guest that has the port closed costs no work at all.
//! The client runs in the process of the VM, which may do nothing that its guest could not be allowed to.

mod channel;
mod client;
mod link;
mod replies;

#[cfg(feature = "fuzzing")]
pub(crate) use client::poll_with;
pub(crate) use client::{Duties, PORT, start};
pub(crate) use link::AgentHandle;
