//! The coordinator's election: Disk Paxos (Gafni and Lamport, 2003) on one disk, one instance per
//! coordinator epoch, and the leader block that makes the winner the coordinator.
//!
//! # States
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
//!   Idle ◄── Outcome::Won(epoch) ◄── Leading: leader block durable ◄── it is this node ◄────┘
//! ```
//!
//! # Rules
//! - Ballot `b` of slot `s` is `counter · slots + s`; it goes to block `counter mod 8` of the slot.
//!   Counters rise over all instances, so that a late write of an earlier ballot does not destroy a
//!   later one.
//! - A block whose last write ended with an error is not reused before the node was reset, by this
//!   process or a later one ([`crate::OutstandingWrites`]). A process writes nothing before
//!   `quiet_since + settle`: by then every other write of earlier processes of the slot has landed, or
//!   never will.
//! - The metadata areas may be read only after [`ElectionOutcome::Won`], when the leader block is
//!   durable. Read all leader blocks again then: epochs may be skipped, and the previous coordinator
//!   is the one with the next lower epoch.
//! - The coordinator needs no lease for safety: it owns nothing by being elected.
//!
//! # Why one process may enter the next instance
//! A slot's blocks of instance `e` are overwritten only after `e` was decided: a leader block shows
//! it, or this process learned it. A slow process still in `e` then sees a later instance and gives
//! up.

use std::collections::BTreeSet;
use std::time::Duration;

use bascule_types::{BootTime, Owner, SlotId};
use bascule_volume_format::{
    Accepted, CoordinatorEpoch, LeaderBlock, PAXOS_SUBSECTORS, PaxosBlock, SlotPart,
};

use bascule_volume_format::{Rules, broken};

/// A candidate: one process's part in the elections of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Election {
    config: ElectionConfig,
    state: State,
    /// The highest counter that this process used.
    counter_used: u64,
    /// Blocks of the slot with a failed write of this boot, which may still land.
    poisoned: BTreeSet<u64>,
    /// A write of the leader block failed: it may land late and overwrite a later one.
    leader_poisoned: bool,
    /// The last instance whose decision this process learned.
    decided: CoordinatorEpoch,
}

/// The parameters of a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ElectionConfig {
    /// This node's slot and generation: the value that the candidate proposes.
    pub me: Owner,
    /// The volume's slot count.
    pub slots: u16,
    /// Every write of an earlier process of this slot was complete at this moment, or is known as failed.
    /// `BootTime(0)`, the node's boot, if the previous process was between two writes when it ended.
    pub quiet_since: BootTime,
    /// The volume's settle time.
    pub settle: Duration,
    /// All rules, except in a test that breaks one.
    pub rules: Rules,
}

/// From when on a candidate, and its driver, may write in the slot.
#[must_use]
pub fn writes_from(rules: Rules, quiet_since: BootTime, settle: Duration) -> BootTime {
    if broken!(rules, ReuseBeforeSettle) {
        return BootTime(0);
    }
    quiet_since.after(settle)
}

/// An input of the candidate.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum ElectionEvent {
    /// Start an attempt: there is no coordinator, or its lease has ended. After
    /// [`ElectionOutcome::Beaten`] wait a random time first.
    Start { now: BootTime },
    /// The result of [`ElectionCommand::ReadBlocks`].
    Blocks {
        /// The Paxos blocks of all slots that can be parsed.
        paxos: Vec<PaxosBlock>,
        /// The leader blocks of all slots that can be parsed.
        leaders: Vec<LeaderBlock>,
    },
    /// The block of the last write command is durable.
    Written,
    /// A read or write failed.
    Failed,
}

/// A command to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum ElectionCommand {
    /// Read all Paxos blocks and all leader blocks. Issue the read now, not earlier.
    ReadBlocks,
    /// Write and flush a Paxos block of this node's slot.
    WritePaxos {
        /// The index of the block in the slot, 0 to 7.
        subsector: u64,
        block: PaxosBlock,
    },
    /// Write and flush the leader block of this node's slot.
    WriteLeader(LeaderBlock),
    /// The attempt is over.
    Done(ElectionOutcome),
}

/// The end of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElectionOutcome {
    /// This node is the coordinator of this epoch and its leader block is durable: recover now.
    Won(CoordinatorEpoch),
    /// Another node won this epoch. If its leader block does not appear within its W, start again.
    Elected(CoordinatorEpoch, Owner),
    /// Another candidate is ahead, or I/O failed: wait a random time, then start again.
    Beaten,
    /// Writes of earlier processes may not have settled: start again at this boot time or later.
    NotBefore(BootTime),
    /// Failed writes of this boot may land late: only after a reset the node can be a candidate.
    Unfit,
}

/// The state without its data, for logs and status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ElectionPhase {
    /// No attempt is under way.
    Idle,
    /// Reads all blocks, to choose instance and ballot.
    Looking,
    /// Phase 1: writes its ballot, then checks that no higher one was entered.
    Preparing,
    /// Phase 2: writes its value, then checks that no higher ballot was entered.
    Accepting,
    /// Writes the leader block.
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
    /// A candidate without an attempt. It writes no part of its slot that is in `barred`: failed writes
    /// of earlier processes of this boot may still land there.
    #[must_use]
    pub fn new(config: ElectionConfig, barred: &BTreeSet<SlotPart>) -> Self {
        let poisoned = barred.iter().filter_map(|part| match part {
            SlotPart::Paxos(subsector) => Some(*subsector),
            SlotPart::Leader | SlotPart::Area(_) => None,
        });
        Self {
            config,
            state: State::Idle,
            counter_used: 0,
            poisoned: poisoned.collect(),
            leader_poisoned: barred.contains(&SlotPart::Leader),
            decided: CoordinatorEpoch(0),
        }
    }

    /// The same process in a later generation of its slot, which it proposes from now on.
    ///
    /// # Panics
    /// When an attempt is under way, or `me` is another slot.
    #[must_use]
    pub fn renamed(mut self, me: Owner) -> Self {
        assert!(self.state == State::Idle && me.slot == self.config.me.slot);
        self.config.me = me;
        self
    }

    /// The state without its data, for logs and status.
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

    /// The next state, and the command to perform.
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
        let ElectionConfig {
            rules,
            quiet_since,
            settle,
            ..
        } = self.config;
        let from = writes_from(rules, quiet_since, settle);
        if now < from {
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
        // An earlier process of this slot may have accepted a value in this instance: the new block
        // keeps it.
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

    /// Whether another candidate entered a higher ballot or a later instance.
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

/// The value that was accepted in the highest ballot of `instance`, by `slot` or by any slot.
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
