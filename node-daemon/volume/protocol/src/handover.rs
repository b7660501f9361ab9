//! The source's side of a migration's commit: from the moment when the transfer is asked for, only
//! an answer of the coordinator decides who runs the guest.
//!
//! ```text
//!   Paused ──Ask──► Asked ──row is the destination's───────────────────► Gone
//!     │               │ ▲ no answer: ask again, same attempt
//!     │               │ └──────────────┐
//!     │ Cancel        │ refused, or Cancel
//!     ▼               ▼                │
//!   MayResume ◄── Reclaiming ──────────┘
//!      row is mine,   │ no answer: ask again
//!      one epoch on   └──row is somebody else's──────────────────────────► Gone
//! ```
//!
//! # Why a refusal is not enough
//! A copy of the request may still be under way when another copy is refused, and be granted
//! later. So before it resumes, the source raises the epoch: it asks for a transfer to itself,
//! under another attempt id. Once that is granted, every copy of the first request is stale.
//!
//! # Guarantees
//! [`HandOverPhase::MayResume`] and [`HandOverPhase::Gone`] are final. Before [`HandOverEvent::Ask`]
//! only the source may ever run; afterwards it runs again only in `MayResume`.

use bascule_types::{AttemptId, Epoch, Owner, VmUid};
use bascule_volume_format::change::{Change, Refusal, VmRow};

use crate::rules::{Rules, broken};

/// What the hand-over is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HandOverRequest {
    /// The VM.
    pub vm: VmUid,
    /// The source, which owns the row.
    pub from: Owner,
    /// In this epoch.
    pub epoch: Epoch,
    /// The destination.
    pub to: Owner,
    /// The attempt: makes the transfer idempotent.
    pub attempt: AttemptId,
    /// Another id, for taking the row back.
    pub reclaim: AttemptId,
    /// The rules in force.
    pub rules: Rules,
}

/// The source's side of one commit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HandOver {
    request: HandOverRequest,
    phase: HandOverPhase,
}

/// Where a hand-over stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HandOverPhase {
    /// The guest is stopped; nothing was asked.
    Paused,
    /// The transfer was asked for: the outcome is unknown. Both sides stay stopped.
    Asked,
    /// The source wants the row back: the outcome is still unknown.
    Reclaiming,
    /// Final: the source owns the row, in this epoch, and may run.
    MayResume(Epoch),
    /// Final: the source never runs again.
    Gone,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandOverEvent {
    /// The destination is ready: ask for the transfer.
    Ask,
    /// Give the migration up, if that is still possible.
    Cancel,
    /// The coordinator granted the request of this attempt: the row as it is now.
    Granted(AttemptId, VmRow),
    /// The coordinator refused the request of this attempt.
    Refused(AttemptId, Refusal),
    /// No answer in time, or the connection broke.
    NoAnswer,
}

/// What the driver must do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandOverCommand {
    /// Ask the coordinator for this change.
    Request(Change),
}

impl HandOver {
    /// A stopped guest that shall go over.
    #[must_use]
    pub fn new(request: HandOverRequest) -> Self {
        Self {
            request,
            phase: HandOverPhase::Paused,
        }
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> HandOverPhase {
        self.phase
    }

    /// The next state and what to do.
    #[must_use]
    pub fn next(self, event: HandOverEvent) -> (Self, Option<HandOverCommand>) {
        use HandOverPhase::{Asked, Gone, MayResume, Paused, Reclaiming};
        let HandOverRequest {
            epoch,
            from,
            attempt,
            reclaim,
            rules,
            ..
        } = self.request;
        match (self.phase, event) {
            (Paused, HandOverEvent::Ask) => self.ask(Asked),
            (Paused, HandOverEvent::Cancel) => self.to(MayResume(epoch)),
            (Asked, HandOverEvent::Granted(answered, _)) if answered == attempt => self.to(Gone),
            (Asked, HandOverEvent::NoAnswer) if broken!(rules, ResumeOnNoAnswer) => {
                self.to(MayResume(epoch))
            }
            (Asked, HandOverEvent::NoAnswer) => self.ask(Asked),
            (Asked, HandOverEvent::Cancel) => self.ask(Reclaiming),
            (Asked, HandOverEvent::Refused(answered, refusal)) if answered == attempt => {
                if broken!(rules, ResumeOnRefusal) {
                    return self.to(MayResume(epoch));
                }
                self.refused(refusal)
            }
            (Reclaiming, HandOverEvent::Granted(answered, row)) if answered == reclaim => {
                if row.owner.map(|owner| owner.slot) == Some(from.slot) {
                    self.to(MayResume(row.epoch))
                } else {
                    self.to(Gone)
                }
            }
            (Reclaiming, HandOverEvent::Granted(..)) => self.to(Gone),
            (Reclaiming, HandOverEvent::NoAnswer) => self.ask(Reclaiming),
            (Reclaiming, HandOverEvent::Refused(answered, refusal)) if answered == reclaim => {
                self.refused(refusal)
            }
            _ => (self, None),
        }
    }

    /// A refusal that says that the row is lost is final; after any other the row is reclaimed,
    /// again and again: the coordinator may not see this node's lease at the moment.
    fn refused(mut self, refusal: Refusal) -> (Self, Option<HandOverCommand>) {
        let (from, epoch) = (self.request.from, self.request.epoch);
        match refusal {
            // Kept through a new generation of this node: the same tenure.
            Refusal::OwnedBy { owner, epoch: now } if (owner.slot, now) == (from.slot, epoch) => {
                self.request.from = owner;
                self.ask(HandOverPhase::Reclaiming)
            }
            Refusal::Fenced { owner } if owner != from => self.ask(HandOverPhase::Reclaiming),
            Refusal::OwnedBy { .. }
            | Refusal::NoSuchVm
            | Refusal::EpochIs { .. }
            | Refusal::Fenced { .. } => self.to(HandOverPhase::Gone),
            _ => self.ask(HandOverPhase::Reclaiming),
        }
    }

    fn ask(mut self, phase: HandOverPhase) -> (Self, Option<HandOverCommand>) {
        self.phase = phase;
        let request = &self.request;
        let (to, attempt) = if phase == HandOverPhase::Reclaiming {
            (request.from, request.reclaim)
        } else {
            (request.to, request.attempt)
        };
        let change = Change::Transfer {
            vm: request.vm,
            from: request.from,
            epoch: request.epoch,
            to,
            attempt,
        };
        (self, Some(HandOverCommand::Request(change)))
    }

    fn to(mut self, phase: HandOverPhase) -> (Self, Option<HandOverCommand>) {
        self.phase = phase;
        (self, None)
    }
}

#[cfg(test)]
mod tests;
