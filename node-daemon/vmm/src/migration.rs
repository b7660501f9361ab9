//! Moving this machine to another process: `bascule-migrate`'s decisions, acted on.
//!
//! ```text
//!   RunningVm ──migrate_live──► Kept (runs on) │ Departed (never again) │ Lost (never again)
//!   PausedVm (incoming) ──receive_live──► Running │ Discarded
//!   RunningVm ──save_to_volume──► PausedVm, saved │ Kept (runs on)
//!   PausedVm (incoming) ──restore_from_volume──► PausedVm, restored
//! ```
//!
//! A migration takes the machine by value and gives it back with what became of it; whoever owns
//! the process keeps serving its control socket meanwhile, and reaches the attempt through
//! [`MigrationControl`]. Nothing here opens or closes the volume for the machine's disks: the owner
//! does, told by the outcome or, on a destination, by [`Arrival`].
//!
//! | module | what |
//! |---|---|
//! | [`control`] | progress, cancelling |
//! | [`outgoing`] | the live source |
//! | [`incoming`] | the live destination |
//! | `copy`, `apply` | guest memory to frames and back |
//! | `channel`, `tls` | frames over mutual TLS over TCP |
//! | [`row`] | the volume's word on who owns the machine |
//! | [`saved`] | quick migration: the machine as an image on its volume |
//! | [`fault`] | where tests break an attempt |

mod apply;
mod channel;
pub mod control;
mod copy;
pub mod fault;
pub mod incoming;
pub mod outgoing;
pub mod row;
pub mod saved;
mod tls;

#[cfg(test)]
mod tests;

pub use control::MigrationControl;
pub use incoming::{Arrival, Incoming, IncomingEnd, prefault, receive_live};
pub use outgoing::{Outgoing, OutgoingEnd, Refused, migrate_live};
pub use row::{RowAuthority, VolumeRow};
pub use saved::{SavedArea, SavedError, image_size, restore_from_volume, save_to_volume};
