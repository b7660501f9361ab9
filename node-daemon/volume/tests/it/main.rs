//! Black-box tests of `bascule-volume`: real processes on one volume in a file.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a fixture that cannot be built fails its test"
)]

mod bad_input;
mod chaos;
mod cluster;
mod failed_writes;
mod hanging_device;
mod lab;
mod peer;
mod repair;
mod storage_stall;
