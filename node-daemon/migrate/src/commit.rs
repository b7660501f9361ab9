//! The source's side of the commit point.
//!
//! The source is stopped, drained and has the destination's `Ready`. From the moment in which
//! [`TransferRequest::Transfer`] is handed to the volume, nobody but the volume knows who may run, and
//! the source asks until it knows too:
//!
//! ```text
//!            no answer ┌──┐                        no answer ┌──┐  refused, row still ours
//!                      ▼  │     refused, row still ours      ▼  │
//!   start ──────────► Asking ──────────────────────────► Retracting
//!                      │   │                             │   │    │
//!      row transferred │   │ row is somebody's           │   │    │ our own transfer granted
//!                      ▼   └────────► Lost ◄─────────────┘   │    ▼
//!                  Committed ◄───────────────────────────────┘  Resumed (epoch + 1)
//! ```
//!
//! | state | who may run |
//! |---|---|
//! | Asking, Retracting | unknown: this side stays stopped |
//! | Committed | the destination, for ever; this side never again |
//! | Resumed | this side; the destination's transfer can no longer be granted |
//! | Lost | whoever the row names; this side never again |
//!
//! # Why a refusal alone does not let the source resume
//! An earlier copy of the same request may still be on its way: through a connection that broke,
//! or a coordinator that was slow. If the source resumed on a refusal (say, because the
//! destination's lease had just lapsed) and that copy were granted later, two would run. So the
//! source first transfers the row **to itself** under an attempt id of its own. That raises the
//! epoch, and every copy of the old request names an epoch that is gone. There is no moment
//! without an owner in which someone else could start the VM.
//!
//! # Assumes
//! [`Reply::Granted`] and [`Reply::Refused`] carry a row that a coordinator read after it had
//! decided the request. A row read from an older state does no harm: it can show at most that a
//! transfer has happened, never that it will not.

use bascule_types::{AttemptId, Epoch, Owner};

#[cfg(test)]
mod tests;

/// What a migration's commit is about. The same on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Terms {
    /// The source.
    pub source: Owner,
    /// The tenure that it holds.
    pub epoch: Epoch,
    /// The destination.
    pub destination: Owner,
    /// The attempt.
    pub attempt: AttemptId,
}

/// What a VM's row says, as far as a commit cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OwnershipRecord {
    /// Who may write; nobody when the VM is stopped.
    pub owner: Option<Owner>,
    /// The tenure.
    pub epoch: Epoch,
    /// The transfer that made this tenure, if one did.
    pub attempt: Option<AttemptId>,
}

/// What to ask the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TransferRequest {
    /// Transfer the row to the destination.
    Transfer(Transfer),
    /// Transfer the row from the source to itself, so that no older request can be granted.
    Retract(Transfer),
}

/// The fields of an ownership transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Transfer {
    /// Who must own the row.
    pub from: Owner,
    /// In which epoch.
    pub epoch: Epoch,
    /// Who is to own it in the next.
    pub to: Owner,
    /// What makes the request idempotent.
    pub attempt: AttemptId,
}

/// What came back for a [`TransferRequest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reply {
    /// It is durable; this is the row.
    Granted(OwnershipRecord),
    /// It was refused; this is the row as read after the refusal.
    Refused(OwnershipRecord),
    /// Refused because the volume knows no such VM.
    NoSuchVm,
    /// No answer, or none that can be trusted: a lost connection, a time-out, an election.
    NoAnswer,
}

/// The source's knowledge after it passed the commit point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Commit {
    /// The transfer was asked for.
    Transferring(Claim),
    /// It was refused at least once; the source takes the row back for itself.
    Retracting(Claim),
    /// The row is the destination's.
    Committed {
        /// In this epoch.
        epoch: Epoch,
    },
    /// The row is the source's, and the destination's transfer can never be granted.
    Resumed {
        /// The source as it owns the row now.
        owner: Owner,
        /// In this epoch.
        epoch: Epoch,
    },
    /// The row is somebody else's, or gone.
    Lost,
}

/// What a source that still hopes for an answer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Claim {
    terms: Terms,
    /// The source as the volume knows it: its generation rises when the node's lease lapsed and
    /// was joined again, and the row goes over in the same epoch.
    us: Owner,
    retraction: AttemptId,
}

impl Terms {
    /// Whether this row says that the transfer has happened and is the latest event.
    #[must_use]
    pub fn transferred(&self, row: &OwnershipRecord) -> bool {
        row.owner == Some(self.destination)
            && row.epoch == self.epoch.next()
            && row.attempt == Some(self.attempt)
    }

    /// The source as this row names it, if the row is still its own in the same tenure. Its
    /// generation may have risen: that of one and the same slot is raised with the row kept
    /// only by the node that holds it.
    #[must_use]
    pub fn held_by_source(&self, row: &OwnershipRecord) -> Option<Owner> {
        row.owner.filter(|owner| {
            owner.slot == self.source.slot
                && owner.generation >= self.source.generation
                && row.epoch == self.epoch
        })
    }
}

impl Commit {
    /// Passes the commit point. `retraction` is a fresh id, different from the attempt's.
    ///
    /// # Panics
    /// When `retraction` is the attempt's own id: taking the row back would then look like the
    /// transfer.
    #[must_use]
    pub fn begin(terms: Terms, retraction: AttemptId) -> Self {
        assert!(
            retraction != terms.attempt,
            "the retraction needs an attempt id of its own"
        );
        Self::Transferring(Claim {
            terms,
            us: terms.source,
            retraction,
        })
    }

    /// Gives up, after something was asked for that a later owner would rely on (the completion of
    /// a saved state): the row is taken back in a new epoch before the source may run.
    ///
    /// # Panics
    /// As [`Self::begin`].
    #[must_use]
    pub fn give_up(terms: Terms, retraction: AttemptId) -> Self {
        match Self::begin(terms, retraction) {
            Self::Transferring(claim) => Self::Retracting(claim),
            other => other,
        }
    }

    /// What to ask now; nothing once the outcome is known.
    #[must_use]
    pub const fn request(&self) -> Option<TransferRequest> {
        match self {
            Self::Transferring(claim) => Some(TransferRequest::Transfer(Transfer {
                from: claim.us,
                epoch: claim.terms.epoch,
                to: claim.terms.destination,
                attempt: claim.terms.attempt,
            })),
            Self::Retracting(claim) => Some(TransferRequest::Retract(Transfer {
                from: claim.us,
                epoch: claim.terms.epoch,
                to: claim.us,
                attempt: claim.retraction,
            })),
            Self::Committed { .. } | Self::Resumed { .. } | Self::Lost => None,
        }
    }

    /// Takes the reply to [`Self::question`].
    #[must_use]
    pub fn next(self, reply: Reply) -> Self {
        match (self, reply) {
            (Self::Transferring(_) | Self::Retracting(_), Reply::NoSuchVm) => Self::Lost,
            (Self::Transferring(claim), Reply::Granted(row) | Reply::Refused(row)) => {
                claim.asked(&row)
            }
            (Self::Retracting(claim), Reply::Granted(row)) => claim.retracted(&row),
            (Self::Retracting(claim), Reply::Refused(row)) => claim.asked(&row),
            (same, _) => same,
        }
    }
}

impl Claim {
    fn asked(self, row: &OwnershipRecord) -> Commit {
        if self.terms.transferred(row) {
            Commit::Committed { epoch: row.epoch }
        } else if let Some(us) = self.terms.held_by_source(row) {
            Commit::Retracting(Self { us, ..self })
        } else if self.is_retraction(row) {
            // An answer to an earlier retraction was lost, and its next copy was refused.
            self.resumed(row)
        } else {
            Commit::Lost
        }
    }

    fn retracted(self, row: &OwnershipRecord) -> Commit {
        if self.is_retraction(row) {
            self.resumed(row)
        } else {
            self.asked(row)
        }
    }

    /// Whether this row was made by our own retraction, which nobody else could have asked for.
    fn is_retraction(self, row: &OwnershipRecord) -> bool {
        row.attempt == Some(self.retraction)
            && row.epoch == self.terms.epoch.next()
            && row.owner.is_some_and(|owner| owner.slot == self.us.slot)
    }

    fn resumed(self, row: &OwnershipRecord) -> Commit {
        Commit::Resumed {
            owner: row.owner.unwrap_or(self.us),
            epoch: row.epoch,
        }
    }
}
