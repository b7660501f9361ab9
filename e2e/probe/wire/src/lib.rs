//! Formats shared by the probe guest and the tests: its command line, the blocks on its disk, the
//! pattern in its memory, its report.
//!
//! Pure values: no devices, no clock, no allocation. The guest is `e2e/probe/src`, the watcher is
//! `bascule-e2e`.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod block;
pub mod guest_report;
pub mod options;
pub mod pattern;

/// The TCP port on which the guest counts lines and takes commands.
pub const TCP_PORT: u16 = 7777;
/// The UDP port on which the guest echoes packets.
pub const UDP_PORT: u16 = 7;
