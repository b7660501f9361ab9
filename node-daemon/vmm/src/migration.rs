//! Migrating this machine to another process: carries out `bascule-migrate`'s decisions.
//!
//! ```text
//!   migrate_live ──► Kept (the guest runs on here) │ Departed │ Lost (never again here)
//!   receive_live ──► Running │ Discarded │ Broken
//!   migrate_quick ──► Kept │ Departed │ Lost          restore_saved ──► ready to run
//! ```
//!
//! The machine stays with the VM actor, which goes on serving the control socket. A migration runs on a
//! thread of its own and handles the machine through [`Guest`] or [`Arrival`]. Other threads show and
//! cancel the attempt through [`MigrationControl`].
//!
//! | module | what |
//! |---|---|
//! | [`control`] | progress, cancelling |
//! | [`request`], [`guest`] | what is requested, and how a machine is handled |
//! | [`outgoing`] | the live source |
//! | [`incoming`], [`listen`], `admission`, `prefault` | the live destination, its port, its source and its memory |
//! | `copy`, `apply` | guest memory to frames and back |
//! | `channel` | frames over mutual TLS over TCP |
//! | [`ownership_client`] | transferring and reading the VM's ownership record |
//! | [`saved`] | quick migration: the machine as an image on its volume |
//! | [`fault`] | fault injection for tests |

mod admission;
mod apply;
mod channel;
pub mod control;
mod copy;
pub mod fault;
pub mod guest;
pub mod incoming;
pub mod listen;
pub mod outgoing;
pub mod ownership_client;
mod prefault;
pub mod request;
pub mod saved;

#[cfg(test)]
mod tests;

pub use control::MigrationControl;
pub use guest::{Arrival, Guest, GuestError};
pub use incoming::{Incoming, IncomingEnd, receive_live};
pub use listen::{ListenError, listen_in};
pub use outgoing::{OutgoingEnd, migrate_live};
pub use ownership_client::{
    OwnershipAuthority, OwnershipClient, OwnershipClientError, RecordAnswer,
};
pub use prefault::PrefaultedMemory;
pub use request::{Outgoing, Refused};
pub use saved::{Quick, SavedArea, migrate_quick, restore_saved};
