//! Moving this machine to another process: `bascule-migrate`'s decisions, acted on.
//!
//! ```text
//!   migrate_live ──► Kept (the guest runs on here) │ Departed │ Lost (never again here)
//!   receive_live ──► Running │ Discarded │ Broken
//!   migrate_quick ──► Kept │ Departed │ Lost          restore_saved ──► ready to run
//! ```
//!
//! The machine stays with its owner, who goes on serving the control socket; a migration runs on a
//! thread of its own and handles the machine through [`Guest`] or [`Arrival`]. Others reach the
//! attempt through [`MigrationControl`].
//!
//! | module | what |
//! |---|---|
//! | [`control`] | progress, cancelling |
//! | [`order`], [`guest`] | what is asked for, and how a machine is handled |
//! | [`outgoing`] | the live source |
//! | [`incoming`] | the live destination |
//! | `copy`, `apply` | guest memory to frames and back |
//! | `channel` | frames over mutual TLS over TCP |
//! | [`row`] | the volume's word on who owns the machine |
//! | [`saved`] | quick migration: the machine as an image on its volume |
//! | [`fault`] | where tests break an attempt |

mod apply;
mod channel;
pub mod control;
mod copy;
pub mod fault;
pub mod guest;
pub mod incoming;
pub mod outgoing;
pub mod ownership_client;
pub mod request;
pub mod saved;

#[cfg(test)]
mod tests;

pub use control::MigrationControl;
pub use guest::{Arrival, Guest, GuestError};
pub use incoming::{Incoming, IncomingEnd, prefault, receive_live};
pub use outgoing::{OutgoingEnd, migrate_live};
pub use ownership_client::{
    OwnershipAuthority, OwnershipClient, OwnershipClientError, RecordAnswer,
};
pub use request::{Outgoing, Refused};
pub use saved::{Quick, SavedArea, migrate_quick, restore_saved};
