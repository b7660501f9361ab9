//! The VM actor: one thread with one inbox, and the only code that changes the machine's phase.
//!
//! # States
//! ```text
//!           built           pause, stop          parked         commit request
//!  Starting ─────► Running ────────────► Pausing ──────► Paused ─────────────► InDoubt ──┬─► Departed
//!     │             ▲ ▲ ▲                   │            │   │                  │        │ transferred
//!     │ incoming    │ │ └───── resume ──────│────────────┘   │                  │        └─► Stopped
//!     ▼         run │ └─── resume (kept) ───│────────────────│──────────────────┘  ownership lost
//!  Incoming ────────┘                       │ stop           │ stop
//!     │ stop                                ▼                ▼
//!     └────────────────────────────────► Ending ◄────────────┘
//!                                           └── torn down, ownership released ──► Stopped
//! ```
//! From `Pausing` a machine may also be reset, and goes back to `Running`: see [`resets`].
//!
//! A failed build goes from `Starting` to `Ending` too. A stop requested in `Starting` or `Pausing`
//! takes effect when that phase is over; in `InDoubt`, `Departed` and `Stopped` it has no effect. A
//! guest that cannot be resumed, or whose task gets no thread, is `Stopped` at once.
//!
//! Other threads send an [`Event`], with a reply channel where they need a result. The loop is
//! select → apply: every event is logged at debug level by its name. `apply` must be short and must
//! not block, because every request on `vm.sock` waits behind it. Work that waits for a disk, a
//! device or the volume has a phase of its own (`Starting`, `Pausing`, `Resetting`, `Ending`), during which a
//! task thread does it and reports the outcome as an event.
//!
//! | module | what |
//! |---|---|
//! | [`event`] | events, their reply channels, the handle by which threads send them |
//! | [`phase`] | the phases and what exists in each |
//! | [`vm_actor`] | the actor: state, event loop, status |
//! | `control_requests` | requests on `vm.sock` |
//! | `start`, `build` | building the machine, on a task thread |
//! | `shutdown` | pausing and ending, on task threads |
//! | `host_shutdown`, `host_shutdown_progress` | SIGTERM: the guest is asked to switch itself off, and stopped when it does not in time |
//! | `migrations`, `migration_guest` | starting migrations, and the machine as their threads see it |
//! | `ownership_watch` | following the gate page: the node has re-joined, or lost the VM |
//! | `guest_ended`, `notices` | a guest that ends by itself, in whatever phase that is noticed |
//! | [`resets`], `reset_wait` | resetting the machine in place, and making a guest wait that does so in a loop |
//! | `disk_failure` | reporting a failed disk to the home volume |

mod build;
mod control_requests;
mod disk_failure;
pub(super) mod event;
mod guest_ended;
mod host_shutdown;
mod host_shutdown_progress;
mod migration_guest;
mod migrations;
mod notices;
mod ownership_watch;
mod phase;
mod reset_wait;
mod resets;
mod shutdown;
mod start;
#[cfg(test)]
mod testing;
pub(super) mod vm_actor;
