//! `bascule-volume`: one process per attached SharedVolume, and the offline tools.
//!
//! The process holds this node's place on the volume: it renews the heartbeat, watches the others,
//! coordinates when it is elected, and hands the device to `bascule-vm` processes, whose every write
//! passes the gate page that it publishes. The rules are in `bascule-volume-protocol` and the bytes
//! in `bascule-volume-format`; here are threads, devices and sockets.
//!
//! ```text
//!  volume.sock ──► control ──► Node::ask ──► lead (here)  or  peer (TCP, mTLS) ──► lead (there)
//!                                             │ decide, journal, re-read leaders, answer
//!  lease thread ──► heartbeat slot, gate page │
//!  watch thread ──► everybody's heartbeats ───┘ evidence
//! ```
//!
//! Read next: [`node`] (what the threads share), [`lead`] (the coordinator), [`lease`].
#![forbid(unsafe_code)]

pub mod control;
pub mod coordinate;
pub mod device;
pub mod join;
pub mod lead;
pub mod lease;
pub mod minder;
pub mod node;
pub mod offline;
pub mod peer;
pub mod records;
pub mod serve;
pub mod signal;
pub mod status;
pub mod watch;
pub mod writers;
