//! The holder's side of a lease: renews the own heartbeat records and knows until when this node
//! may write.
//!
//! ```text
//!   start(None) ───► Lapsed ──NewGeneration──► Begun ──first record acknowledged──► Held
//!                      ▲                          │                              │ ▲
//!                      │     expiry passes        │                              │ ▲
//!                      ├──────────────────────────┴──────────────────────────────┤ │ acknowledged
//!                      │                                                         ▼ │ in time (R2)
//!                      └────────────────────────────────────────────── Rereading ─► Renewing
//!
//!   any state ──foreign UID, newer generation or a lost record in the own slot──► Stopped
//!   Held, nothing outstanding ──Leave──► one last record, "detached" ──► Stopped(Left)
//! ```
//!
//! # Rules
//! - **R1** The expiry counts from before the record was submitted: from the issue of the re-read
//!   that preceded it. So two processes that hold the same slot by mistake do not outlast what a
//!   watcher concludes from the newer one's records.
//! - **R2** An acknowledgement extends the lease only if it arrives before the current expiry. A
//!   generation without an acknowledged record has an expiry too: the moment of its beginning + L.
//! - **R3** One renewal is outstanding at a time; a sequence number is sent once, over all lives of
//!   the process (the gate page keeps the highest).
//! - Before each renewal the own records are read. A foreign node, a newer generation, or the
//!   absence of the record that was acknowledged last stops this machine for good.
//! - A lapsed lease never comes back: the next one has a newer generation, which the node chooses
//!   itself, higher than any in its slot and its slot's row. That gives it no row yet: the
//!   coordinator hands rows over by `Change::Rejoin`, which names the generation before.
//!
//! # Assumes
//! A heartbeat write is submitted so that the end of the process waits for it (`pwrite`, not
//! io_uring), and the gate page's lock with it.

mod events;

use bascule_types::{BootTime, Owner};

pub use events::{
    Held, LeaseCommand, LeaseConfig, LeaseEvent, LeasePhase, OwnRecord, OwnRecordFound, StopReason,
};

use crate::rules::broken;

/// The holder's side of one lease.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LeaseHolder {
    config: LeaseConfig,
    /// The highest number ever sent.
    sequence_sent: u64,
    /// The highest number acknowledged in the present generation.
    sequence_acked: Option<u64>,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    /// No lease. A write of the lapsed generation may still be outstanding.
    Lapsed { outstanding: Option<u64> },
    /// A generation that has begun, and a lease if it is `open`.
    Leased { term: Term, step: Step },
    /// For good.
    Stopped(StopReason),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Term {
    owner: Owner,
    /// Before this an acknowledgement must arrive (R2); if `open`, until this writes may go.
    expiry: BootTime,
    /// Whether a record of this generation was acknowledged in time.
    open: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    /// Nothing outstanding; the next renewal is due at this moment.
    Waiting { due: BootTime },
    /// The own records are being read.
    Rereading { issued_at: BootTime },
    /// A record was submitted. If it is acknowledged in time, the lease counts from `from` (R1).
    Renewing {
        sequence: u64,
        from: BootTime,
        detached: bool,
    },
    /// A record of the generation before is still outstanding: R3 makes this one wait.
    WaitingForOld { sequence: u64 },
}

type Next = (LeaseHolder, Option<LeaseCommand>);

impl LeaseHolder {
    /// A holder at the start of its process. `held` is what the gate page of this boot showed;
    /// `sequence_sent` is the highest number in the page **or** the own slot.
    #[must_use]
    pub fn start(
        config: LeaseConfig,
        now: BootTime,
        held: Option<Held>,
        sequence_sent: u64,
    ) -> Self {
        let state = match held {
            Some(Held { owner, expiry }) if now < expiry => State::Leased {
                term: Term {
                    owner,
                    expiry,
                    open: true,
                },
                step: Step::Waiting { due: now },
            },
            _ => State::Lapsed { outstanding: None },
        };
        Self {
            config,
            sequence_sent,
            sequence_acked: None,
            state,
        }
    }

    /// The lease to publish in the gate page after every step; none closes the gate.
    #[must_use]
    pub fn lease(&self) -> Option<Held> {
        match self.state {
            State::Leased { term, .. } if term.open => Some(Held {
                owner: term.owner,
                expiry: term.expiry,
            }),
            _ => None,
        }
    }

    /// The generation that this holder speaks for; none while lapsed or stopped.
    #[must_use]
    pub fn owner(&self) -> Option<Owner> {
        match self.state {
            State::Leased { term, .. } => Some(term.owner),
            _ => None,
        }
    }

    /// The highest sequence number ever sent.
    #[must_use]
    pub fn sequence_sent(&self) -> u64 {
        self.sequence_sent
    }

    /// The state, for logs and status.
    #[must_use]
    pub fn phase(&self) -> LeasePhase {
        match self.state {
            State::Lapsed { .. } => LeasePhase::Lapsed,
            State::Leased { term, .. } if term.open => LeasePhase::Held,
            State::Leased { .. } => LeasePhase::Begun,
            State::Stopped(reason) => LeasePhase::Stopped(reason),
        }
    }

    /// Whether the process may be replaced now: nothing of it is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        !matches!(
            self.state,
            State::Lapsed {
                outstanding: Some(_)
            } | State::Leased {
                step: Step::Rereading { .. } | Step::Renewing { .. } | Step::WaitingForOld { .. },
                ..
            }
        )
    }

    /// The next state and what to do.
    #[must_use]
    pub fn next(self, event: LeaseEvent) -> (Self, Option<LeaseCommand>) {
        match (self.state, event) {
            (State::Stopped(_), _) => (self, None),
            (State::Lapsed { outstanding }, event) => self.next_lapsed(outstanding, &event),
            (State::Leased { term, step }, event) => self.next_leased(term, step, event),
        }
    }

    fn next_lapsed(self, outstanding: Option<u64>, event: &LeaseEvent) -> Next {
        match *event {
            LeaseEvent::Written { sequence, .. } | LeaseEvent::WriteFailed { sequence, .. }
                if outstanding == Some(sequence) =>
            {
                self.to(State::Lapsed { outstanding: None })
            }
            LeaseEvent::NewGeneration { now, owner } => {
                let expiry = now.after(self.config.timings.lease);
                let step = match outstanding {
                    Some(sequence) => Step::WaitingForOld { sequence },
                    None => Step::Waiting { due: now },
                };
                let mut next = self;
                next.sequence_acked = None;
                next.to(State::Leased {
                    term: Term {
                        owner,
                        expiry,
                        open: false,
                    },
                    step,
                })
            }
            LeaseEvent::Leave { .. } => self.to(State::Stopped(StopReason::Left)),
            _ => (self, None),
        }
    }

    fn next_leased(self, term: Term, step: Step, event: LeaseEvent) -> Next {
        match (step, event) {
            (
                Step::Renewing {
                    sequence,
                    from,
                    detached,
                },
                LeaseEvent::Written {
                    now,
                    sequence: acknowledged,
                },
            ) if sequence == acknowledged => {
                self.acknowledged(term, sequence, (from, now), detached)
            }
            (
                Step::Renewing { sequence, .. } | Step::WaitingForOld { sequence },
                LeaseEvent::WriteFailed {
                    now,
                    sequence: failed,
                }
                | LeaseEvent::Written {
                    now,
                    sequence: failed,
                },
            ) if sequence == failed => self.wait(term, now, now),
            (Step::Waiting { due }, LeaseEvent::Tick { now }) if now >= due => {
                self.reread(term, now)
            }
            (Step::Rereading { issued_at }, LeaseEvent::OwnRecords { now, records }) => {
                self.reread_done(term, (issued_at, now), &records)
            }
            (Step::Rereading { .. }, LeaseEvent::ReadFailed { now }) => self.wait(term, now, now),
            (Step::Waiting { .. }, LeaseEvent::Leave { now }) if now < term.expiry => {
                self.submit(term, now, true)
            }
            (_, LeaseEvent::Tick { now }) => self.tick(term, step, now),
            _ => (self, None),
        }
    }

    /// A tick on which nothing is due: the expiry may have passed.
    fn tick(self, term: Term, step: Step, now: BootTime) -> Next {
        if self.has_lapsed(term, now) {
            let outstanding = match step {
                Step::Renewing { sequence, .. } | Step::WaitingForOld { sequence } => {
                    Some(sequence)
                }
                Step::Waiting { .. } | Step::Rereading { .. } => None,
            };
            return self.to(State::Lapsed { outstanding });
        }
        if let Step::Renewing {
            sequence,
            from,
            detached,
        } = step
            && broken!(self.config.rules, SequenceSentTwice)
            && now > from
        {
            let step = Step::Renewing {
                sequence,
                from: now,
                detached,
            };
            let command = Self::record(term, sequence, detached);
            return (self.to(State::Leased { term, step }).0, Some(command));
        }
        (self, None)
    }

    fn reread(self, term: Term, now: BootTime) -> Next {
        if self.has_lapsed(term, now) {
            return self.to(State::Lapsed { outstanding: None });
        }
        if broken!(self.config.rules, RenewWithoutReread) {
            return self.submit(term, now, false);
        }
        let step = Step::Rereading { issued_at: now };
        let (next, _) = self.to(State::Leased { term, step });
        (next, Some(LeaseCommand::ReadOwnRecords))
    }

    fn reread_done(
        self,
        term: Term,
        (issued_at, now): (BootTime, BootTime),
        records: &[OwnRecord],
    ) -> Next {
        let found = |record: &OwnRecord| OwnRecordFound {
            node: record.node,
            owner: record.owner,
        };
        let stop = |reason| State::Stopped(reason);
        if let Some(record) = records
            .iter()
            .find(|r| r.node != self.config.node && r.owner.generation >= term.owner.generation)
        {
            let reason = StopReason::ForeignNode(found(record));
            return self.to(stop(reason));
        }
        let newer = |r: &&OwnRecord| r.owner.generation > term.owner.generation;
        if let Some(record) = records.iter().find(newer) {
            let reason = StopReason::NewerGeneration(found(record));
            return self.to(stop(reason));
        }
        let newest = records
            .iter()
            .filter(|r| r.owner == term.owner)
            .map(|r| r.sequence)
            .max();
        if let Some(sequence) = self.sequence_acked
            && newest < Some(sequence)
        {
            return self.to(stop(StopReason::RecordLost { sequence }));
        }
        if self.has_lapsed(term, now) {
            return self.to(State::Lapsed { outstanding: None });
        }
        self.submit(term, issued_at, false)
    }

    fn submit(mut self, term: Term, from: BootTime, detached: bool) -> Next {
        let sequence = self.sequence_sent + 1;
        self.sequence_sent = sequence;
        let step = Step::Renewing {
            sequence,
            from,
            detached,
        };
        let command = Self::record(term, sequence, detached);
        (self.to(State::Leased { term, step }).0, Some(command))
    }

    fn acknowledged(
        mut self,
        mut term: Term,
        sequence: u64,
        (from, now): (BootTime, BootTime),
        detached: bool,
    ) -> Next {
        self.sequence_acked = Some(sequence);
        if detached {
            return self.to(State::Stopped(StopReason::Left));
        }
        if self.has_lapsed(term, now) {
            return self.to(State::Lapsed { outstanding: None });
        }
        let from = if broken!(self.config.rules, LeaseCountsFromAcknowledgement) {
            now
        } else {
            from
        };
        term.expiry = term.expiry.max(from.after(self.config.timings.lease));
        term.open = true;
        if now >= term.expiry {
            return self.to(State::Lapsed { outstanding: None });
        }
        let due = from.after(self.config.timings.renewal);
        self.wait(term, now, due)
    }

    fn wait(self, term: Term, now: BootTime, due: BootTime) -> Next {
        if self.has_lapsed(term, now) {
            return self.to(State::Lapsed { outstanding: None });
        }
        let step = Step::Waiting { due };
        self.to(State::Leased { term, step })
    }

    fn has_lapsed(&self, term: Term, now: BootTime) -> bool {
        if broken!(self.config.rules, LateAcknowledgementExtends) {
            return false;
        }
        now >= term.expiry
    }

    fn record(term: Term, sequence: u64, detached: bool) -> LeaseCommand {
        LeaseCommand::WriteRecord {
            owner: term.owner,
            sequence,
            detached,
        }
    }

    fn to(mut self, state: State) -> Next {
        self.state = state;
        (self, None)
    }
}

#[cfg(test)]
mod tests;
