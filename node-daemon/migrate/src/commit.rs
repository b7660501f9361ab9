//! The source's side of the commit point.
//!
//! The source is stopped and drained and has received the destination's `Ready`. Once
//! [`TransferRequest::Transfer`] has been handed to the volume, only the ownership record on the volume
//! says who may run, and the source repeats its request until it has an answer:
//!
//! # States
//! ```text
//!  begin ──► Transferring ──refused, source still owner──► Retracting ◄── give_up
//!             │ ▲ no answer                                 │ ▲ no answer,
//!             │ └─┐                                         │ └─┐ refused, source still owner
//!             └───┤                                         └───┤
//!                 ├─── ownership transferred ───► Committed ◄───┤
//!                 ├─── own retraction granted ──► Resumed ◄─────┤
//!                 └─── other owner, no such VM ─► Lost ◄────────┘
//! ```
//!
//! | state | who may run |
//! |---|---|
//! | Transferring, Retracting | unknown: this side stays stopped |
//! | Committed | the destination; this side never again |
//! | Resumed | this side; the destination's transfer can no longer be granted |
//! | Lost | the owner in the ownership record; this side never again |
//!
//! # Why a refusal alone does not let the source resume
//! An earlier copy of the same request may still be on its way, on a broken connection or in a slow
//! coordinator. If the source resumed on a refusal (say, because the destination's lease had just
//! lapsed) and that copy were granted later, both sides would run the guest. So the source first
//! transfers the ownership **to itself** under an attempt id of its own. That raises the epoch, and
//! every copy of the old request names an epoch that is over. The VM has an owner throughout, so that
//! no third node can start it.
//!
//! # Assumes
//! [`Reply::Granted`] and [`Reply::Refused`] carry the ownership record that a coordinator read after
//! it had decided the request. A record read from an older state does no harm: it can show at most that
//! a transfer has happened, never that it will not.

use bascule_types::{AttemptId, Epoch, Owner};

#[cfg(test)]
mod tests;

/// The two sides of a migration and its attempt; the same on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Terms {
    /// The source, as it owned the VM when the attempt began.
    pub source: Owner,
    /// The epoch in which the source owns the VM.
    pub epoch: Epoch,
    /// The node that is to own the VM.
    pub destination: Owner,
    /// Makes the transfer request idempotent.
    pub attempt: AttemptId,
}

/// The fields of a VM's ownership record on the volume that matter for a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OwnershipRecord {
    /// The only node that may write the VM's disks; none when the VM is stopped.
    pub owner: Option<Owner>,
    /// Rises with every change of ownership.
    pub epoch: Epoch,
    /// The attempt whose transfer began this epoch, if a transfer did.
    pub attempt: Option<AttemptId>,
}

/// A request to the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TransferRequest {
    /// Transfer the ownership to the destination.
    Transfer(Transfer),
    /// Transfer the ownership from the source to itself, so that no older request can be granted.
    Retract(Transfer),
}

/// The fields of an ownership transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Transfer {
    /// The owner that the record must name.
    pub from: Owner,
    /// The epoch that the record must name.
    pub epoch: Epoch,
    /// The owner in the next epoch.
    pub to: Owner,
    /// Makes the request idempotent.
    pub attempt: AttemptId,
}

/// The volume's reply to a [`TransferRequest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reply {
    /// Granted and durable, with the record as it is now.
    Granted(OwnershipRecord),
    /// Refused, with the record as read after the refusal.
    Refused(OwnershipRecord),
    /// Refused because the volume knows no such VM.
    NoSuchVm,
    /// No usable reply: a lost connection, a time-out, an election.
    NoAnswer,
}

/// What the source knows after it has passed the commit point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Commit {
    /// The transfer was requested.
    Transferring(Claim),
    /// The transfer was refused at least once; the source requests the ownership for itself.
    Retracting(Claim),
    /// The destination owns the VM.
    Committed {
        /// The destination's epoch.
        epoch: Epoch,
    },
    /// The source owns the VM, and the destination's transfer can never be granted.
    Resumed {
        /// The source as the record names it now.
        owner: Owner,
        epoch: Epoch,
    },
    /// Another node owns the VM, or the volume has no such VM.
    Lost,
}

/// What a source that waits for a reply holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Claim {
    terms: Terms,
    /// The source as the record names it. Its generation rises when the node's lease lapsed and the
    /// node joined again; the ownership is then kept in the same epoch.
    us: Owner,
    retraction: AttemptId,
}

impl Terms {
    /// Whether `row` shows that the transfer has happened and nothing since.
    #[must_use]
    pub fn transferred(&self, row: &OwnershipRecord) -> bool {
        row.owner == Some(self.destination)
            && row.epoch == self.epoch.next()
            && row.attempt == Some(self.attempt)
    }

    /// The source as `row` names it, if it still owns the VM in the same epoch. Its generation may have
    /// risen: only the node that holds a slot raises the slot's generation and keeps the ownership.
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
    /// When `retraction` is the attempt's own id: the retraction would then look like the transfer.
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

    /// Begins with the retraction, for an attempt that fails after a request that a later owner would
    /// rely on (the completion of a saved state): the source may run only in a new epoch.
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

    /// The request to send now; none once the outcome is known.
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

    /// Takes the reply to [`Self::request`].
    #[must_use]
    pub fn next(self, reply: Reply) -> Self {
        match (self, reply) {
            (Self::Transferring(_) | Self::Retracting(_), Reply::NoSuchVm) => Self::Lost,
            (Self::Transferring(claim), Reply::Granted(row) | Reply::Refused(row)) => {
                claim.answered(&row)
            }
            (Self::Retracting(claim), Reply::Granted(row)) => claim.retracted(&row),
            (Self::Retracting(claim), Reply::Refused(row)) => claim.answered(&row),
            (same, _) => same,
        }
    }
}

impl Claim {
    fn answered(self, row: &OwnershipRecord) -> Commit {
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
            self.answered(row)
        }
    }

    /// Whether `row` is the result of this source's retraction; no other node knows that id.
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
