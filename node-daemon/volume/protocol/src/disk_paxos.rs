//! The coordinator's election: Disk Paxos (Gafni and Lamport, 2003) on one disk, one instance per
//! coordinator epoch, and the steps that make its winner the coordinator.
//!
//! ```text
//!            Start
//!   Idle ───────────► Looking ──► Preparing ──► Promised? ──► Accepting ──► Accepted? ──► (value
//!    ▲               read all     write mbal     read all     write bal      read all    decided)
//!    │                  │             │             │             │             │           │
//!    └──────────────────┴─────────────┴─────────────┴─────────────┴─────────────┘           │
//!      Outcome::Beaten: a higher ballot or a later instance was seen, or I/O failed         │
//!                                                                                           │
//!   Idle ◄── Outcome::Elected(other) ── the value is another node ◄─────────────────────────┤
//!                                                                                           │
//!   Idle ◄── Outcome::Won(epoch) ◄── Leading: leader block durable ◄── the value is me ◄────┘
//! ```
//!
//! # Rules
//! - Ballot `b` of slot `s` is `counter · slots + s`; it goes to block `counter mod 8` of the slot.
//!   Counters rise over all instances, so that a late write of an earlier ballot destroys no later
//!   one.
//! - A block whose last write has not completed, or ended with an error, is not used again by this
//!   process. A process writes nothing before `quiet_since + settle`: by then what earlier lives of
//!   the slot submitted has landed, or never will.
//! - Only after [`ElectionOutcome::Won`], with the leader block durable, may the old epoch's areas
//!   be read. Read all leader blocks again then: epochs may be skipped, and the one before is
//!   whoever made its leader block durable last.
//! - To coordinate is not to own: a winner without a lease of its own does no harm, and no good.
//!
//! # Why one process may go on to the next instance
//! A slot's blocks for instance `e` are overwritten only when `e` is decided: a leader block shows
//! it, or this process learned it. A slow process still in `e` then sees a later instance and
//! gives up.

use std::collections::BTreeSet;
use std::time::Duration;

use bascule_types::{BootTime, Owner, SlotId};
use bascule_volume_format::{
    Accepted, CoordinatorEpoch, LeaderBlock, PAXOS_SUBSECTORS, PaxosBlock,
};

use crate::rules::{Rules, broken};

/// One process's part in the elections of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Election {
    config: ElectionConfig,
    state: State,
    /// The highest counter that this process used.
    counter_used: u64,
    /// Blocks of the slot with a write that did not end well.
    poisoned: BTreeSet<u64>,
    /// A leader block's write did not end well: it may land late and hide a later one.
    leader_poisoned: bool,
    /// The last instance whose decision this process learned.
    decided: CoordinatorEpoch,
}

/// What an election needs to know for its whole life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ElectionConfig {
    /// This node's slot and generation: the value that it proposes.
    pub me: Owner,
    /// The volume's slot count.
    pub slots: u16,
    /// No earlier life of this slot has a Paxos or leader write under way that it submitted after
    /// this moment. `BootTime(0)`, the node's boot, if such writes are submitted so that the end of
    /// a process waits for them (`pwrite`); else the moment when the process before was gone.
    pub quiet_since: BootTime,
    /// The volume's settle time.
    pub settle: Duration,
    /// The rules in force.
    pub rules: Rules,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ElectionEvent {
    /// Try: there is no coordinator, or its lease is over. Wait a random time after
    /// [`ElectionOutcome::Beaten`].
    Start {
        /// The moment.
        now: BootTime,
    },
    /// What [`ElectionCommand::ReadBlocks`] asked for: every block that can be parsed, of every
    /// slot.
    Blocks {
        /// The Paxos blocks.
        paxos: Vec<PaxosBlock>,
        /// The leader blocks.
        leaders: Vec<LeaderBlock>,
    },
    /// The block that was to be written is durable.
    Written,
    /// A read or write failed.
    Failed,
}

/// What the driver must do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElectionCommand {
    /// Read all Paxos blocks and all leader blocks. Issue the read now, not earlier.
    ReadBlocks,
    /// Write this to the own slot's block, durably.
    WritePaxos {
        /// Which of the slot's blocks.
        subsector: u64,
        /// The contents.
        block: PaxosBlock,
    },
    /// Write this to the own slot's leader block, durably.
    WriteLeader(LeaderBlock),
    /// The attempt is over.
    Done(ElectionOutcome),
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElectionOutcome {
    /// This node coordinates in this epoch; its leader block is durable. Now read the old areas.
    Won(CoordinatorEpoch),
    /// Another node won this epoch. If its leader block does not appear within its W, start again.
    Elected(CoordinatorEpoch, Owner),
    /// Somebody else is ahead, or I/O failed: wait a random time.
    Beaten,
    /// The writes of earlier lives may not have settled: try again from this moment on.
    NotBefore(BootTime),
    /// Writes of this process failed and may land late: only a new process can take part.
    Unfit,
}

/// The state without its data, for logs and status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ElectionPhase {
    /// Nothing under way.
    Idle,
    /// Reading what there is.
    Looking,
    /// Writing and checking a promise.
    Preparing,
    /// Writing and checking an acceptance.
    Accepting,
    /// Writing the leader block.
    Leading,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    Idle,
    Looking,
    Preparing(Ballot, Half),
    Accepting(Ballot, Accepted, Half),
    Leading(CoordinatorEpoch),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Ballot {
    instance: CoordinatorEpoch,
    counter: u64,
    number: u64,
}

/// The two halves of a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Half {
    Write,
    Read,
}

type Next = (Election, Option<ElectionCommand>);

impl Election {
    /// A process that takes part from now on.
    #[must_use]
    pub fn new(config: ElectionConfig) -> Self {
        Self {
            config,
            state: State::Idle,
            counter_used: 0,
            poisoned: BTreeSet::new(),
            leader_poisoned: false,
            decided: CoordinatorEpoch(0),
        }
    }

    /// The same process in a later generation of its slot: proposes that from now on.
    ///
    /// # Panics
    /// When an attempt is under way, or `me` is another slot.
    #[must_use]
    pub fn renamed(mut self, me: Owner) -> Self {
        assert!(self.state == State::Idle && me.slot == self.config.me.slot);
        self.config.me = me;
        self
    }

    /// The state, for logs and status.
    #[must_use]
    pub fn phase(&self) -> ElectionPhase {
        match self.state {
            State::Idle => ElectionPhase::Idle,
            State::Looking => ElectionPhase::Looking,
            State::Preparing(..) => ElectionPhase::Preparing,
            State::Accepting(..) => ElectionPhase::Accepting,
            State::Leading(..) => ElectionPhase::Leading,
        }
    }

    /// The next state and what to do.
    #[must_use]
    pub fn next(self, event: &ElectionEvent) -> (Self, Option<ElectionCommand>) {
        match (self.state, event) {
            (State::Idle, ElectionEvent::Start { now }) => self.start(*now),
            (State::Idle, _) | (_, ElectionEvent::Start { .. }) => (self, None),
            (State::Looking, ElectionEvent::Blocks { paxos, leaders }) => self.look(paxos, leaders),
            (State::Preparing(ballot, Half::Write), ElectionEvent::Written) => {
                self.read_in(State::Preparing(ballot, Half::Read))
            }
            (State::Preparing(ballot, Half::Read), ElectionEvent::Blocks { paxos, leaders }) => {
                self.promised(ballot, paxos, leaders)
            }
            (State::Accepting(ballot, accepted, Half::Write), ElectionEvent::Written) => {
                if broken!(self.config.rules, DecideWithoutReread) {
                    return self.decide(ballot.instance, accepted.value);
                }
                self.read_in(State::Accepting(ballot, accepted, Half::Read))
            }
            (
                State::Accepting(ballot, accepted, Half::Read),
                ElectionEvent::Blocks { paxos, leaders },
            ) => {
                if self.is_beaten(ballot, paxos, leaders) {
                    return self.done(ElectionOutcome::Beaten);
                }
                self.decide(ballot.instance, accepted.value)
            }
            (State::Leading(epoch), ElectionEvent::Written) => {
                self.done(ElectionOutcome::Won(epoch))
            }
            (_, ElectionEvent::Failed) => self.failed(),
            _ => (self, None),
        }
    }

    fn start(self, now: BootTime) -> Next {
        let from = self.config.quiet_since.after(self.config.settle);
        if now < from && !broken!(self.config.rules, ReuseBeforeSettle) {
            return self.done(ElectionOutcome::NotBefore(from));
        }
        if self.leader_poisoned || self.poisoned.len() as u64 == PAXOS_SUBSECTORS {
            return self.done(ElectionOutcome::Unfit);
        }
        self.read_in(State::Looking)
    }

    fn look(mut self, paxos: &[PaxosBlock], leaders: &[LeaderBlock]) -> Next {
        let led = leaders.iter().map(|leader| leader.epoch).max();
        let known = led.unwrap_or_default().max(self.decided);
        let begun = paxos.iter().map(|block| block.instance).max();
        let instance = begun.unwrap_or_default().max(known.next());
        let slots = u64::from(self.config.slots.max(1));
        let counter_seen = paxos.iter().map(|block| block.mbal / slots).max();
        let mut counter = counter_seen.unwrap_or(0).max(self.counter_used) + 1;
        while self.poisoned.contains(&(counter % PAXOS_SUBSECTORS)) {
            counter += 1;
        }
        self.counter_used = counter;
        let ballot = Ballot {
            instance,
            counter,
            number: counter * slots + u64::from(self.config.me.slot.0),
        };
        // An earlier life may have accepted in this instance: the new block takes that along.
        let own = accepted_in(instance, paxos, Some(self.config.me.slot));
        let block = self.block(ballot, own);
        self.write_in(State::Preparing(ballot, Half::Write), ballot, block)
    }

    fn promised(self, ballot: Ballot, paxos: &[PaxosBlock], leaders: &[LeaderBlock]) -> Next {
        if self.is_beaten(ballot, paxos, leaders) {
            return self.done(ElectionOutcome::Beaten);
        }
        let earlier = if broken!(self.config.rules, ForgetAccepted) {
            None
        } else {
            accepted_in(ballot.instance, paxos, None)
        };
        let accepted = Accepted {
            bal: ballot.number,
            value: earlier.map_or(self.config.me, |accepted| accepted.value),
        };
        let block = self.block(ballot, Some(accepted));
        let state = State::Accepting(ballot, accepted, Half::Write);
        self.write_in(state, ballot, block)
    }

    /// Whether anybody entered a higher ballot or a later instance.
    fn is_beaten(&self, mine: Ballot, paxos: &[PaxosBlock], leaders: &[LeaderBlock]) -> bool {
        let later = |block: &PaxosBlock| {
            block.instance > mine.instance
                || block.instance == mine.instance
                    && block.mbal > mine.number
                    && !broken!(self.config.rules, IgnoreHigherBallot)
        };
        paxos.iter().any(later) || leaders.iter().any(|leader| leader.epoch >= mine.instance)
    }

    fn decide(mut self, epoch: CoordinatorEpoch, winner: Owner) -> Next {
        self.decided = self.decided.max(epoch);
        if winner != self.config.me {
            return self.done(ElectionOutcome::Elected(epoch, winner));
        }
        let leader = LeaderBlock {
            epoch,
            coordinator: winner,
        };
        self.state = State::Leading(epoch);
        (self, Some(ElectionCommand::WriteLeader(leader)))
    }

    fn failed(mut self) -> Next {
        match self.state {
            State::Preparing(ballot, Half::Write) | State::Accepting(ballot, _, Half::Write) => {
                self.poisoned.insert(ballot.counter % PAXOS_SUBSECTORS);
            }
            State::Leading(_) => self.leader_poisoned = true,
            _ => {}
        }
        self.done(ElectionOutcome::Beaten)
    }

    fn block(&self, ballot: Ballot, accepted: Option<Accepted>) -> PaxosBlock {
        PaxosBlock {
            instance: ballot.instance,
            writer: self.config.me,
            mbal: ballot.number,
            accepted,
        }
    }

    fn read_in(mut self, state: State) -> Next {
        self.state = state;
        (self, Some(ElectionCommand::ReadBlocks))
    }

    fn write_in(mut self, state: State, ballot: Ballot, block: PaxosBlock) -> Next {
        self.state = state;
        let subsector = ballot.counter % PAXOS_SUBSECTORS;
        (self, Some(ElectionCommand::WritePaxos { subsector, block }))
    }

    fn done(mut self, outcome: ElectionOutcome) -> Next {
        self.state = State::Idle;
        (self, Some(ElectionCommand::Done(outcome)))
    }
}

/// What was accepted in the highest ballot of `instance`, by `slot` or by anybody.
fn accepted_in(
    instance: CoordinatorEpoch,
    paxos: &[PaxosBlock],
    slot: Option<SlotId>,
) -> Option<Accepted> {
    paxos
        .iter()
        .filter(|block| block.instance == instance)
        .filter(|block| slot.is_none_or(|slot| block.writer.slot == slot))
        .filter_map(|block| block.accepted)
        .max_by_key(|accepted| accepted.bal)
}

#[cfg(test)]
mod tests;
