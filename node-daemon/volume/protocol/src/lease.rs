//! The holder's side of a lease: renews this node's heartbeat and computes until when the node may
//! write. (sanlock: delta lease.)
//!
//! # States
//! ```text
//!   start(None) ───► Lapsed ──NewGeneration──► Begun ──first record acknowledged──► Held
//!                      ▲                          │                              │ ▲
//!                      │     expiry passes        │                              │ ▲
//!                      ├──────────────────────────┴──────────────────────────────┤ │ acknowledged
//!                      │                                                         ▼ │ in time (R2)
//!                      └────────────────────────────────────────────── Rereading ─► Renewing
//!
//!   any state ──another node's UID, a newer generation or a lost record in the slot──► Stopped
//!   Held, nothing outstanding ──Leave──► one last record, "detached" ──► Stopped(Left)
//! ```
//!
//! # Rules
//! - **R1** The expiry counts from before the record was submitted: from the issue of the re-read
//!   that preceded it. If two processes hold the same slot by mistake, the older one's lease ends
//!   before a watcher can conclude, from the newer one's records, that it has ended.
//! - **R2** An acknowledgement extends the lease only if it arrives before the current expiry. A
//!   generation without an acknowledged record has an expiry too: the moment of its beginning + L.
//! - **R3** One renewal is outstanding at a time; a sequence number is sent once, over all lives of
//!   the process (the gate page keeps the highest).
//! - Before each renewal the slot's records are read. Another node's UID, a newer generation, or the
//!   absence of the record that was acknowledged last stops this machine; only a new process starts
//!   again.
//! - A lapsed lease is not renewed. The next lease has a newer generation, which the node chooses
//!   itself: higher than any in its slot and in the slot's row. The new generation owns no VM until
//!   the coordinator grants `Change::Rejoin`, which names the generation before.
//!
//! # Assumes
//! A heartbeat write is submitted so that the end of the process waits for it (`pwrite`, not
//! io_uring), and the gate page's lock with it.

mod events;

use bascule_types::{BootTime, Owner};

pub use events::{
    Held, LeaseCommand, LeaseConfig, LeaseEvent, LeasePhase, OwnRecord, OwnRecordFound, StopReason,
};

use bascule_volume_format::broken;

/// The holder's side of one lease.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LeaseHolder {
    config: LeaseConfig,
    /// The highest sequence number ever submitted, in any generation.
    sequence_sent: u64,
    /// The highest sequence number acknowledged in the present generation.
    sequence_acked: Option<u64>,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    /// No lease. A write of the lapsed generation may still be outstanding.
    Lapsed { outstanding: Option<u64> },
    /// A generation that has begun, and a lease if it is `open`.
    Leased { lease: Lease, step: Step },
    /// Final.
    Stopped(StopReason),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Lease {
    owner: Owner,
    /// An acknowledgement must arrive before this moment (R2). If `open`, writes pass until then.
    expiry: BootTime,
    /// Whether a record of this generation was acknowledged before the expiry.
    open: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    /// Nothing outstanding; the next renewal is due at `due`.
    Waiting { due: BootTime },
    /// The slot's records are being read.
    Rereading { issued_at: BootTime },
    /// A record was submitted. If it is acknowledged in time, the lease counts from `from` (R1).
    Renewing {
        sequence: u64,
        from: BootTime,
        detached: bool,
    },
    /// A record of the previous generation is outstanding: R3 forbids the first of this one.
    WaitingForOld { sequence: u64 },
}

type Next = (LeaseHolder, Option<LeaseCommand>);

impl LeaseHolder {
    /// The state at the start of a process. `held` is the lease in the gate page of this boot;
    /// `sequence_sent` is the highest sequence number in the page **or** in the slot.
    #[must_use]
    pub fn start(
        config: LeaseConfig,
        now: BootTime,
        held: Option<Held>,
        sequence_sent: u64,
    ) -> Self {
        let state = match held {
            Some(Held { owner, expiry }) if now < expiry => State::Leased {
                lease: Lease {
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

    /// The lease to publish in the gate page after every event; none closes the gate.
    #[must_use]
    pub fn lease(&self) -> Option<Held> {
        match self.state {
            State::Leased { lease, .. } if lease.open => Some(Held {
                owner: lease.owner,
                expiry: lease.expiry,
            }),
            _ => None,
        }
    }

    /// The slot and its present generation; none while lapsed or stopped.
    #[must_use]
    pub fn owner(&self) -> Option<Owner> {
        match self.state {
            State::Leased { lease, .. } => Some(lease.owner),
            _ => None,
        }
    }

    /// The highest sequence number ever submitted.
    #[must_use]
    pub fn sequence_sent(&self) -> u64 {
        self.sequence_sent
    }

    /// The state without its data, for logs and status.
    #[must_use]
    pub fn phase(&self) -> LeasePhase {
        match self.state {
            State::Lapsed { .. } => LeasePhase::Lapsed,
            State::Leased { lease, .. } if lease.open => LeasePhase::Held,
            State::Leased { .. } => LeasePhase::Begun,
            State::Stopped(reason) => LeasePhase::Stopped(reason),
        }
    }

    /// Whether the process may be replaced now: no read or write of it is outstanding.
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

    /// The next state, and the command to perform.
    #[must_use]
    pub fn next(self, event: LeaseEvent) -> (Self, Option<LeaseCommand>) {
        match (self.state, event) {
            (State::Stopped(_), _) => (self, None),
            (State::Lapsed { outstanding }, event) => self.next_lapsed(outstanding, &event),
            (State::Leased { lease, step }, event) => self.next_leased(lease, step, event),
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
                    lease: Lease {
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

    fn next_leased(self, lease: Lease, step: Step, event: LeaseEvent) -> Next {
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
                self.acknowledged(lease, sequence, (from, now), detached)
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
            ) if sequence == failed => self.wait(lease, now, now),
            (Step::Waiting { due }, LeaseEvent::Tick { now }) if now >= due => {
                self.reread(lease, now)
            }
            (Step::Rereading { issued_at }, LeaseEvent::OwnRecords { now, records }) => {
                self.reread_done(lease, (issued_at, now), &records)
            }
            (Step::Rereading { .. }, LeaseEvent::ReadFailed { now }) => self.wait(lease, now, now),
            (Step::Waiting { .. }, LeaseEvent::Leave { now }) if now < lease.expiry => {
                self.submit(lease, now, true)
            }
            (_, LeaseEvent::Tick { now }) => self.tick(lease, step, now),
            _ => (self, None),
        }
    }

    /// A tick without a due renewal: the expiry may have passed.
    fn tick(self, lease: Lease, step: Step, now: BootTime) -> Next {
        if self.has_lapsed(lease, now) {
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
            let command = Self::record(lease, sequence, detached);
            return (self.to(State::Leased { lease, step }).0, Some(command));
        }
        (self, None)
    }

    fn reread(self, lease: Lease, now: BootTime) -> Next {
        if self.has_lapsed(lease, now) {
            return self.to(State::Lapsed { outstanding: None });
        }
        if broken!(self.config.rules, RenewWithoutReread) {
            return self.submit(lease, now, false);
        }
        let step = Step::Rereading { issued_at: now };
        let (next, _) = self.to(State::Leased { lease, step });
        (next, Some(LeaseCommand::ReadOwnRecords))
    }

    fn reread_done(
        self,
        lease: Lease,
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
            .find(|r| r.node != self.config.node && r.owner.generation >= lease.owner.generation)
        {
            let reason = StopReason::ForeignNode(found(record));
            return self.to(stop(reason));
        }
        let newer = |r: &&OwnRecord| r.owner.generation > lease.owner.generation;
        if let Some(record) = records.iter().find(newer) {
            let reason = StopReason::NewerGeneration(found(record));
            return self.to(stop(reason));
        }
        let newest = records
            .iter()
            .filter(|r| r.owner == lease.owner)
            .map(|r| r.sequence)
            .max();
        if let Some(sequence) = self.sequence_acked
            && newest < Some(sequence)
        {
            return self.to(stop(StopReason::RecordLost { sequence }));
        }
        if self.has_lapsed(lease, now) {
            return self.to(State::Lapsed { outstanding: None });
        }
        self.submit(lease, issued_at, false)
    }

    fn submit(mut self, lease: Lease, from: BootTime, detached: bool) -> Next {
        let sequence = self.sequence_sent + 1;
        self.sequence_sent = sequence;
        let step = Step::Renewing {
            sequence,
            from,
            detached,
        };
        let command = Self::record(lease, sequence, detached);
        (self.to(State::Leased { lease, step }).0, Some(command))
    }

    fn acknowledged(
        mut self,
        mut lease: Lease,
        sequence: u64,
        (from, now): (BootTime, BootTime),
        detached: bool,
    ) -> Next {
        self.sequence_acked = Some(sequence);
        if detached {
            return self.to(State::Stopped(StopReason::Left));
        }
        if self.has_lapsed(lease, now) {
            return self.to(State::Lapsed { outstanding: None });
        }
        let from = if broken!(self.config.rules, LeaseCountsFromAcknowledgement) {
            now
        } else {
            from
        };
        lease.expiry = lease.expiry.max(from.after(self.config.timings.lease));
        lease.open = true;
        if now >= lease.expiry {
            return self.to(State::Lapsed { outstanding: None });
        }
        let due = from.after(self.config.timings.renewal);
        self.wait(lease, now, due)
    }

    fn wait(self, lease: Lease, now: BootTime, due: BootTime) -> Next {
        if self.has_lapsed(lease, now) {
            return self.to(State::Lapsed { outstanding: None });
        }
        let step = Step::Waiting { due };
        self.to(State::Leased { lease, step })
    }

    fn has_lapsed(&self, lease: Lease, now: BootTime) -> bool {
        if broken!(self.config.rules, LateAcknowledgementExtends) {
            return false;
        }
        now >= lease.expiry
    }

    fn record(lease: Lease, sequence: u64, detached: bool) -> LeaseCommand {
        LeaseCommand::WriteRecord {
            owner: lease.owner,
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
