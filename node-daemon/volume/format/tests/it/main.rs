//! The format through its public interface: bytes, decisions, crash states.
#![expect(
    clippy::unwrap_used,
    clippy::unwrap_in_result,
    clippy::panic,
    reason = "a fixture that cannot be built fails its test"
)]

mod bytes;
mod coordinator_decisions;
mod crash;
mod crash_again;
mod damage;
mod features;
mod fixture;
mod follower;
mod format_again;
mod full_table;
mod late_writes;
mod room;
mod superblock_copies;
