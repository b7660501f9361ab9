//! Moving a running virtual machine: the wire format and the state machines of both sides.
//!
//! This crate decides; it does not act. It must not know KVM, sockets, TLS, threads or clocks:
//! bytes come in through [`std::io::Read`], moments as [`std::time::Duration`]s since the start of
//! the attempt, and what to do goes out as values. The adapter that acts on them is
//! `bascule-vmm`'s `migration` module.
//!
//! ```text
//!  source                                                     destination
//!  ──────                                                     ───────────
//!  Greeting        Hello ───────────────────────────────────► ExpectHello
//!                  ◄─────────────────────────────── Welcome
//!  Describing      Config ──────────────────────────────────► ExpectConfig
//!                  ◄──────────────────────── RoundAck(round 0)
//!  CopyingMemory   Memory … RoundEnd ───────────────────────► ExpectMemory   (guest runs)
//!                  ◄─────────────────────────────── RoundAck
//!  SendingState    Memory … RoundEnd, State …, StateEnd ────► ExpectState    (guest stopped)
//!                  ◄────────────────────────────────── Ready
//!  ═══ commit point: the source asks the volume to transfer the row ═══════ ExpectCommit
//!  Committing      (asks until the volume has answered)
//!  Departed        Committed ───────────────────────────────► Committed
//!                  ◄──────────────────────────────── Running
//! ```
//!
//! # The commit point
//!
//! It is the moment in which the source hands [`commit::TransferRequest::Transfer`] to its volume. Before
//! it every failure, of either side or of the link, ends with the guest running on the source.
//! After it the volume's row alone says who may run: see [`commit`] for the source's rules and
//! [`destination::ExpectCommit`] for the destination's.
//!
//! Read in this order: [`wire`], [`destination`], [`source`], [`precopy`], [`commit`].
#![forbid(unsafe_code)]

pub mod commit;
pub mod destination;
#[cfg(test)]
mod model;
pub mod pages;
pub mod precopy;
pub mod source;
pub mod wire;

pub use commit::{Commit, OwnershipRecord};
pub use pages::{MemoryLayout, PAGE_BYTES, PageIndex, PageRange, Pages};
pub use wire::{Frame, FrameBuffer, FrameWriter, WireError};
