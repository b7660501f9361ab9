//! The protocol's machines under every schedule: crashes, restarts, freezes, late writes, clocks
//! that drift. Small bounds by default; `BASCULE_MODEL=large` widens them.
//!
//! Each model drives the real machines and the real metadata; only the disk, the clocks and the
//! scheduler are the model's own. `mutations.rs` breaks one rule at a time and expects the model to
//! notice.
#![expect(clippy::unwrap_used, clippy::panic, reason = "fixtures of tests")]

mod checker;
mod mutations;
mod table;

mod coordinator;
mod election;
mod fence;
mod handover;
mod lease;
