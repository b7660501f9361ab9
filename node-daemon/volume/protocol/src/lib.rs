//! The rules by which nodes share a volume: who may write, who coordinates, and when a silent
//! node's virtual machines may run elsewhere.
//!
//! Everything here is a state machine that takes events and yields commands. There is no I/O, no
//! clock, no thread and no async: a driver (`bascule-volume`) performs the commands and feeds
//! their completions back, and the models under `tests/model/` feed the same machines every schedule of
//! crashes, restarts, freezes and late writes.
//!
//! | machine | who runs it | rules |
//! |---|---|---|
//! | [`LeaseHolder`] | every attached node | R1, R2, R3, re-read before renewal, one lease per generation |
//! | [`Watcher`] | every attached node | R4, R5, W |
//! | [`fence`] | the coordinator | what proves that a silent owner will not write again |
//! | [`Election`] | a node that wants to coordinate | Disk Paxos; leader block before old journal |
//! | [`Coordinator`] | the coordinator | an answer needs a durable record and a later re-read |
//! | [`Writers`], [`watchdog`] | every attached node | pets, and when a volume may be withdrawn |
//!
//! The source of a migration has a machine too, `bascule_migrate::commit`; the models here hold it
//! against the volume's real metadata.
//!
//! # Guarantees
//! With the assumptions of the format (one block is written atomically, a submitted write takes
//! effect at most once, after the reset of its initiator within `settle` or never), invariants I1
//! and I2 of the design hold. `tests/model/` looks for counterexamples, and
//! `tests/model/mutations.rs` shows that each rule is needed.
//!
//! Read next: [`LeaseHolder`], then [`Watcher`] and [`fence`].
#![forbid(unsafe_code)]

mod coordinator_answers;
mod disk_paxos;
mod drift;
pub mod fence;
mod join_claim;
mod lease;
mod open_writers;
mod rules;
pub mod watchdog_policy;
mod watcher;

pub use coordinator_answers::{Coordinator, CoordinatorCommand, CoordinatorEvent, Ticket};
pub use disk_paxos::{
    Election, ElectionCommand, ElectionConfig, ElectionEvent, ElectionOutcome, ElectionPhase,
};
pub use drift::Drift;
pub use join_claim::{JoinClaim, OwnSlot, join_claim};
pub use lease::{
    Held, LeaseCommand, LeaseConfig, LeaseEvent, LeaseHolder, LeasePhase, OwnRecord,
    OwnRecordFound, StopReason,
};
pub use open_writers::{WriterEvent, Writers};
#[cfg(feature = "fault-injection")]
pub use rules::Mutation;
pub use rules::Rules;
pub use watcher::{Evidence, HeartbeatSeen, Standing, WatchEvent, Watcher};
