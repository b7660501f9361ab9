//! The format from outside: its bytes, its decisions, its crashes.
#![expect(
    clippy::unwrap_used,
    clippy::unwrap_in_result,
    clippy::panic,
    reason = "a fixture that cannot be built fails its test"
)]

mod bytes;
mod coordinator_decisions;
mod crash;
mod fixture;
