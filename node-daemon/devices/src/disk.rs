//! The data path of a virtual disk: requests on guest memory → extents of the volume → io_uring.
//!
//! [`Disk`] describes the backend: an open device, the extents of the disk on it, and the gate that
//! its writes must pass. [`DiskEngine`] performs requests on it. Nothing here knows virtio queues.
//!
//! # Guarantees
//! - Every batch of writes checks [`WriteGate::is_open`] right before the system call that submits it. While
//!   the gate is closed, writes wait and the guest sees no error. Reads do not wait.
//! - Writes that overlap, counted in whole device blocks, are performed one after the other, in the
//!   order of arrival. So a write of part of a block (read-modify-write) loses no bytes of another
//!   write to the same block.
//! - A flush is submitted after every write that arrived before it has completed.
//! - An error of a request is the guest's error of that request: the disk goes on. With
//!   [`bascule_types::OnError::Pause`] a read or write that failed is held instead, and with it whatever
//!   comes later, until [`DiskEngine::retry_held`]. A flush is not: a flush that is tried again may succeed
//!   although what it was for is lost.
//! - Reads and writes that fail because the path to the device is lost are submitted again, about once
//!   a second, while the guest waits. An unspecific I/O error counts as such if the volume's first block
//!   cannot be read either.
//! - A failed write may still land, so after one, or a failed flush, the engine is unclean for good
//!   ([`DiskEngine::writer_state`]), even when it is idle. Until the volume's settle time has passed, no
//!   other write is submitted to its blocks, which it could undo.
//! - Neither a completion nor an arrival costs work for each request that waits, whatever a guest has queued, and
//!   one call does a bounded part of the work: a pause waits only for the commands that the device has.
//!
//! `tests/sim` runs engines on a device that fails, also with each of the rules about errors broken.
//!
//! Read next: `engine` for the life of a request.

mod backend;
mod engine;
mod errors;
mod extent;
mod gate;
mod geometry;
mod job;
mod overlap;
mod ready;
mod request;
mod ring;
mod rules;
mod slab;
mod steps;
mod unsettled;
mod waiting;

pub use backend::{Disk, SETTLE_DEFAULT};
pub use engine::{DiskEngine, Drained, EngineStats};
pub use errors::ErrorPolicy;
pub use extent::{ExtentError, ExtentMap};
pub use gate::{AlwaysOpen, VolumeGate, WriteGate};
pub use geometry::block_bytes_of;
pub use request::{Completion, DiskRequest, Operation};
pub use ring::{Command, HostRun, Ring, UringRing};
#[cfg(feature = "fault-injection")]
pub use ring::{DeviceCommand, SimulatedDevice, SimulatedRing, Transferred};
#[cfg(feature = "fault-injection")]
pub use rules::Mutation;
pub use rules::Rules;
