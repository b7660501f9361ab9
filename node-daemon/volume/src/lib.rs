//! `bascule-volume`: one process per attached SharedVolume, and the offline tools `format`, `check` and
//! `repair`.
//!
//! The process holds this node's slot on the volume: it renews the node's heartbeat, watches the
//! heartbeats of the other nodes, coordinates while it is elected, and hands the device to
//! `bascule-vm` processes. Every disk write of those passes the gate page that this process
//! publishes. The rules are in `bascule-volume-protocol`, the on-disk bytes in
//! `bascule-volume-format`; this crate has the threads, device I/O and sockets.
//!
//! ```text
//!  volume.sock ─► local_api ─► VolumeContext::request_coordinator
//!                                 ├─► coordinator::term (this process)
//!                                 └─► peer_rpc (TCP, mTLS) ─► coordinator::term (other node)
//!                                        decide, journal, re-read leader blocks, answer
//!  heartbeat_renewal thread ──► heartbeat slot, gate page
//!  peer_watch thread ─────────► heartbeats of all nodes, leader blocks: evidence for fencing
//! ```
//!
//! Read next: [`volume_context`] (what the threads share), [`coordinator`], [`heartbeat_renewal`].
#![forbid(unsafe_code)]
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod block_device;
pub mod control_blocks;
pub mod coordinator;
pub mod heartbeat_renewal;
pub mod host;
pub mod job_queue;
pub mod listeners;
pub mod local_api;
pub mod local_clients;
pub mod offline_tools;
pub mod output;
pub mod peer_rpc;
pub mod peer_watch;
pub mod process;
pub mod published_watchdog;
pub mod repair_command;
pub mod serve_command;
pub mod shutdown_signal;
pub mod sleep_inhibitor;
pub mod slot_registration;
pub mod turn;
pub mod volume_context;
pub mod volume_status;
pub mod watchdog_client;
pub mod write_ledger;
pub mod writer_lock;
pub mod writer_table;
pub mod writers;
