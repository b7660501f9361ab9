//! Watchers: a guest as seen from outside.
//!
//! Each runs on its own thread and takes the time when data arrives, so that a blackout is measured at
//! the client, not by the timers of the process that caused it.

mod console;
mod flow;
mod session;

pub use console::{Console, Tick};
pub use flow::{Flow, FlowSummary};
pub use session::Session;
