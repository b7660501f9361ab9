//! Watchers: what is seen of a guest from outside.
//!
//! All of them run on threads of their own and take the time when something arrives, so that a
//! blackout is measured where a client would feel it, not by the timers of the one that caused it.

mod console;
mod flow;
mod session;

pub use console::{Console, Tick};
pub use flow::{Flow, FlowSummary};
pub use session::Session;
