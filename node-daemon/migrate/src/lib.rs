//! Moving a running virtual machine: the wire format and the state machines of both sides.
//!
//! This crate decides and performs no I/O. It must not know KVM, sockets, TLS, threads or clocks:
//! bytes come in through [`std::io::Read`], points in time as [`std::time::Duration`]s since the start
//! of the attempt, and decisions go out as values. `bascule-vmm`'s `migration` module carries them out.
//!
//! ```text
//!  source                                                     destination
//!  ──────                                                     ───────────
//!  Greeting        Hello ───────────────────────────────────► ExpectHello
//!                  ◄─────────────────────────────── Welcome
//!  Describing      Config ──────────────────────────────────► ExpectConfig
//!                  ◄──────────────────────── RoundAck(round 0)
//!  Copying         Memory … RoundEnd ───────────────────────► ExpectMemory   (guest runs)
//!                  ◄─────────────────────────────── RoundAck
//!  AwaitingMemory  ◄─────────────────────────────── Resident                 (after round 1)
//!  Sending         Memory … RoundEnd, State …, StateEnd ────► ExpectState    (guest stopped)
//!  AwaitingReady   ◄────────────────────────────────── Ready
//!  ═══ commit point: the source requests the ownership transfer ═══════════ ExpectCommit
//!  Committing      (repeats the request until the volume answers)
//!  Departed        Committed ───────────────────────────────► (runs the guest)
//!                  ◄──────────────────────────────── Running
//! ```
//!
//! # The commit point
//!
//! The commit point is passed when the source hands [`commit::TransferRequest::Transfer`] to its
//! volume. Before it every failure of either side or of the link ends with the guest running on the
//! source. After it only the ownership record on the volume says which side may run the guest: see
//! [`commit`] for the source's rules and [`destination::ExpectCommit`] for the destination's.
//!
//! Read in this order: [`wire`], [`destination`], [`source`], [`precopy`], [`commit`].
#![forbid(unsafe_code)]

pub mod commit;
pub mod destination;
pub mod pages;
pub mod precopy;
pub mod source;
#[cfg(test)]
mod tests;
pub mod wire;

pub use commit::{Commit, OwnershipRecord};
pub use pages::{MemoryLayout, PAGE_BYTES, PageIndex, PageRange, Pages};
pub use wire::{Frame, FrameBuffer, FrameWriter, WireError};
