//! When a coordinator may answer a request.
//!
//! # States
//! ```text
//!   record durable ──► waiting ──ReadLeader issued──► checking ──own epoch is highest──► Answer
//!                                                        │
//!                                                        └──a higher epoch──► Deposed: no answer
//! ```
//!
//! # Guarantees
//! A new coordinator makes its leader block durable before it reads the journal. If a re-read of the
//! leader blocks that was issued after the record was durable still shows the old epoch, the record
//! was durable before the new leader block, and the new coordinator reads it. Records that a deposed
//! coordinator wrote later were never acknowledged; their requesters repeat the request to the new
//! coordinator (every change is idempotent).

use bascule_volume_format::CoordinatorEpoch;

use bascule_volume_format::{Rules, broken};

/// A coordinator's pending answers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Coordinator {
    epoch: CoordinatorEpoch,
    rules: Rules,
    state: State,
}

/// Identifies a request whose journal record is written and whose answer is pending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// An input of the coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CoordinatorEvent {
    /// A record was written and flushed.
    Durable(Ticket),
    /// The leader blocks were read.
    Leader {
        /// The highest epoch among them.
        highest: CoordinatorEpoch,
    },
    /// The leader blocks could not be read.
    LeaderReadFailed,
    /// A journal write or flush failed: the volume is sticky-failed on this node.
    JournalFailed,
}

/// A command to the driver.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CoordinatorCommand {
    /// Read every slot's leader block. Issue the read now, not earlier.
    ReadLeader,
    /// These records will survive this coordinator: send the answers.
    Answer(Vec<Ticket>),
    /// This node is no longer the coordinator. Whether these records count is unknown: send no
    /// answer, so that the requesters turn to the successor.
    Deposed(Vec<Ticket>),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    Active {
        /// Durable, not yet covered by a re-read.
        waiting: Vec<Ticket>,
        /// Covered by the re-read that is under way.
        checking: Option<Vec<Ticket>>,
    },
    Deposed,
}

impl Coordinator {
    /// The coordinator of `epoch`, after it won its election, recovered the old journal and made its
    /// own first checkpoint durable.
    #[must_use]
    pub fn new(epoch: CoordinatorEpoch, rules: Rules) -> Self {
        Self {
            epoch,
            rules,
            state: State::Active {
                waiting: Vec::new(),
                checking: None,
            },
        }
    }

    /// The epoch that this coordinator won.
    #[must_use]
    pub fn epoch(&self) -> CoordinatorEpoch {
        self.epoch
    }

    /// Whether the coordinator still takes requests.
    #[must_use]
    pub fn is_active(&self) -> bool {
        matches!(self.state, State::Active { .. })
    }

    /// The next state, and the commands to perform, in this order.
    #[must_use]
    pub fn next(self, event: CoordinatorEvent) -> (Self, Vec<CoordinatorCommand>) {
        let State::Active { waiting, checking } = self.state else {
            // A record that became durable after the deposition is not answered.
            let commands = match event {
                CoordinatorEvent::Durable(ticket) => {
                    vec![CoordinatorCommand::Deposed(vec![ticket])]
                }
                _ => Vec::new(),
            };
            return (self, commands);
        };
        let (epoch, rules) = (self.epoch, self.rules);
        let mut next = Active {
            waiting,
            checking,
            commands: Vec::new(),
        };
        let active = match event {
            CoordinatorEvent::Durable(ticket) => next.durable(ticket, rules),
            CoordinatorEvent::Leader { highest } => next.leader(highest == epoch),
            CoordinatorEvent::LeaderReadFailed => next.read_failed(),
            CoordinatorEvent::JournalFailed => next.depose(),
        };
        let state = if active {
            State::Active {
                waiting: next.waiting,
                checking: next.checking,
            }
        } else {
            State::Deposed
        };
        (
            Self {
                epoch,
                rules,
                state,
            },
            next.commands,
        )
    }
}

/// An active coordinator while it handles an event. Each method returns whether it stays active.
struct Active {
    waiting: Vec<Ticket>,
    checking: Option<Vec<Ticket>>,
    commands: Vec<CoordinatorCommand>,
}

impl Active {
    fn durable(&mut self, ticket: Ticket, rules: Rules) -> bool {
        if broken!(rules, AnswerWithoutReread) {
            self.commands.push(CoordinatorCommand::Answer(vec![ticket]));
            return true;
        }
        if broken!(rules, RereadIssuedEarly)
            && let Some(checking) = &mut self.checking
        {
            checking.push(ticket);
            return true;
        }
        self.waiting.push(ticket);
        self.check();
        true
    }

    /// Starts a re-read for all waiting records, unless one is under way.
    fn check(&mut self) {
        if self.checking.is_none() && !self.waiting.is_empty() {
            self.checking = Some(std::mem::take(&mut self.waiting));
            self.commands.push(CoordinatorCommand::ReadLeader);
        }
    }

    fn leader(&mut self, mine: bool) -> bool {
        if !mine {
            return self.depose();
        }
        if let Some(tickets) = self.checking.take() {
            self.commands.push(CoordinatorCommand::Answer(tickets));
        }
        self.check();
        true
    }

    fn read_failed(&mut self) -> bool {
        if let Some(mut tickets) = self.checking.take() {
            tickets.append(&mut self.waiting);
            self.waiting = tickets;
        }
        self.check();
        true
    }

    fn depose(&mut self) -> bool {
        let mut tickets = self.checking.take().unwrap_or_default();
        tickets.append(&mut self.waiting);
        self.commands.push(CoordinatorCommand::Deposed(tickets));
        false
    }
}

#[cfg(test)]
mod tests;
