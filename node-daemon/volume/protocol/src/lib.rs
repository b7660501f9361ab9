//! The protocol by which nodes share a volume: which node may write, which one is the coordinator,
//! and when the virtual machines of a failed node may run elsewhere.
//!
//! Each part is a state machine that takes events and returns commands. There is no I/O, no clock,
//! no thread and no async: a driver (`bascule-volume`) performs the commands and reports their
//! completion as events. The models under `tests/model/` run the same machines through every
//! schedule of crashes, restarts, freezes and late writes.
//!
//! | machine | runs on | rules |
//! |---|---|---|
//! | [`LeaseHolder`] | every attached node | R1, R2, R3, re-read before renewal, one lease per generation |
//! | [`Watcher`] | every attached node | R4, R5, W |
//! | [`fence`] | the coordinator | the proof that a failed owner will not write again |
//! | [`Election`] | a candidate for coordinator | Disk Paxos; the leader block is durable before the old journal is read |
//! | [`Coordinator`] | the coordinator | an answer needs a durable record and a later re-read |
//! | [`Writers`], [`Enlistment`], [`watchdog_policy`] | every attached node | when to pet the watchdog, and when it may stop watching a volume |
//!
//! The source of a migration has a state machine of its own, `bascule_migrate::commit`; a model here
//! runs it against the volume's real metadata.
//!
//! # Guarantees
//! With the assumptions of the format (one block is written atomically, a submitted write takes
//! effect at most once, after the reset of its initiator within `settle` or never), invariants I1
//! and I2 of ARCHITECTURE.md hold. `tests/model/` searches for counterexamples, and
//! `tests/model/mutations.rs` shows that each rule is needed.
//!
//! Read next: [`LeaseHolder`], then [`Watcher`] and [`fence`].
#![forbid(unsafe_code)]

mod coordinator_answers;
mod disk_paxos;
mod drift;
mod enlistment;
pub mod fence;
mod join_claim;
mod lease;
mod open_writers;
mod outstanding_writes;
pub mod watchdog_policy;
mod watcher;

#[cfg(feature = "fault-injection")]
pub use bascule_volume_format::Mutation;
pub use bascule_volume_format::{Rules, broken};
pub use coordinator_answers::{Coordinator, CoordinatorCommand, CoordinatorEvent, Ticket};
pub use disk_paxos::{
    Election, ElectionCommand, ElectionConfig, ElectionEvent, ElectionOutcome, ElectionPhase,
    writes_from,
};
pub use drift::Drift;
pub use enlistment::{Enlistment, WatchdogCall, WriterActivity};
pub use join_claim::{JoinClaim, OwnSlot, join_claim};
pub use lease::{
    Held, LeaseCommand, LeaseConfig, LeaseEvent, LeaseHolder, LeasePhase, OwnRecord,
    OwnRecordFound, StopReason,
};
pub use open_writers::{Phase as WriterPhase, WriterEvent, WriterId, Writers};
pub use outstanding_writes::{OutstandingWrites, Part, Predecessor};
pub use watcher::{Evidence, HeartbeatSeen, Standing, WatchEvent, Watcher};
