//! Models of the protocol: its state machines under every schedule of crashes, restarts, freezes,
//! late writes and drifting clocks. Small bounds by default; `BASCULE_MODEL=large` widens them.
//!
//! Each model runs the real state machines and the real metadata; only the disk, the clocks and the
//! scheduler are simulated. `mutations.rs` breaks one rule at a time and expects a model to find a
//! counterexample.
#![expect(clippy::unwrap_used, clippy::panic, reason = "fixtures of tests")]

mod checker;
mod mutations;
mod table;

mod coordinator;
mod election;
mod election_on_disk;
mod features;
mod fence;
mod handover;
mod lease;
mod watchdog;
