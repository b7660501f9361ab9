//! One migration's commit: the source's machine, the real metadata, a coordinator that crashes before
//! it answers, and a network that loses, delays, repeats and reorders.
//!
//! The source has one request outstanding at a time and ignores answers to earlier ones; but any copy
//! of an earlier request may still be decided. The destination runs when it sees its ownership.
//! Meanwhile the source's node may rejoin in a new generation, the destination's lease may appear to
//! have lapsed, and the source may retract.

use std::collections::BTreeMap;

use bascule_migrate::commit::{Commit, OwnershipRecord, Reply, Terms, TransferRequest};
use bascule_types::{Answer, AttemptId, Change, Epoch, MissingProof, SlotId};
use bascule_volume_format::Fencing;
use bascule_volume_protocol::{Mutation, Rules};
use stateright::{Model, Property};

use crate::checker::{Size, holds};
use crate::table::{Row, Table, TestWitness, VM, owner, rejoin};

const ATTEMPT: AttemptId = AttemptId::from_bytes([1; 16]);
const RETRACTION: AttemptId = AttemptId::from_bytes([2; 16]);
const SOURCE: u16 = 0;
const DESTINATION: u16 = 1;

#[derive(Clone, Debug)]
pub(crate) struct HandOverModel {
    pub(crate) rules: Rules,
    pub(crate) requests: u8,
    pub(crate) losses: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    table: Table,
    source: Source,
    /// Outstanding requests, sorted.
    requests: Vec<Message>,
    /// The outstanding answer to the last request.
    answer: Option<Outcome>,
    /// How many requests the source has sent.
    requests_sent: u8,
    losses_left: u8,
    destination_alive: bool,
    destination_runs: bool,
    /// Which slot owned each epoch.
    owners: BTreeMap<Epoch, SlotId>,
    two_owners: bool,
}

/// The source's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Source {
    /// The guest is stopped; no request was sent.
    Paused,
    /// The migration was cancelled before a request: the guest runs.
    Unasked,
    Committing(Commit),
    /// The guest runs because a rule is broken.
    Broken,
}

/// A request with its serial number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Message {
    serial: u8,
    retracts: bool,
    generation: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Outcome {
    Granted(Row),
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    Ask,
    /// Retract: a saved state was declared complete and must not count.
    GiveUp,
    Cancel,
    NoAnswer,
    Decide(usize),
    LoseRequest(usize),
    Answer,
    LoseAnswer,
    DestinationLooks,
    DestinationSeemsDead,
    DestinationSeemsAlive,
    SourceRejoins,
}

impl HandOverModel {
    pub(crate) fn new(rules: Rules, size: Size) -> Self {
        Self {
            rules,
            requests: size.pick(4, 5),
            losses: size.pick(2, 3),
        }
    }

    /// Sends the source's present request; answers to earlier ones are ignored from now on.
    fn ask(state: &mut State) {
        let Source::Committing(commit) = state.source else {
            return;
        };
        let (retracts, transfer) = match commit.request() {
            Some(TransferRequest::Transfer(transfer)) => (false, transfer),
            Some(TransferRequest::Retract(transfer)) => (true, transfer),
            None => return,
        };
        assert_eq!(transfer.epoch, Epoch(1));
        state.requests_sent += 1;
        state.answer = None;
        state.requests.push(Message {
            serial: state.requests_sent,
            retracts,
            generation: transfer.from.generation.0,
        });
        state.requests.sort_unstable();
    }

    fn decide(&self, state: &mut State, index: usize) {
        let message = state.requests.remove(index);
        let from = owner(SOURCE, message.generation);
        let (to, attempt) = if message.retracts {
            (from, RETRACTION)
        } else {
            (owner(DESTINATION, 1), ATTEMPT)
        };
        let change = Change::Transfer {
            vm: VM,
            from,
            epoch: Epoch(1),
            to,
            attempt,
        };
        let destination_alive = state.destination_alive;
        let witness = TestWitness {
            alive: |owner: bascule_types::Owner| owner.slot.0 == SOURCE || destination_alive,
            over: |_| Err(MissingProof::Alive),
            proof: |_| Err(MissingProof::Alive),
        };
        let requester = (owner(SOURCE, state.table.generation(SOURCE)), 1);
        let outcome = match state.table.ask(&change, requester, &witness, self.rules) {
            Ok(Answer::Row(row)) => Outcome::Granted(Row {
                owner: row.owner,
                epoch: row.epoch,
                attempt: row.attempt,
            }),
            Ok(other) => panic!("a transfer was answered by {other:?}"),
            Err(_) => Outcome::Refused,
        };
        if message.serial == state.requests_sent {
            state.answer = Some(outcome);
        }
        state.note_owner();
    }

    /// The answer arrives; after a refusal the row is read, which shows it as it is then.
    fn answer(&self, state: &mut State) {
        let Some(outcome) = state.answer.take() else {
            return;
        };
        let Source::Committing(commit) = state.source else {
            return;
        };
        let reply = match outcome {
            Outcome::Granted(row) => Reply::Granted(row.seen()),
            Outcome::Refused => Reply::Refused(state.table.row().seen()),
        };
        if let Reply::Refused(row) = reply
            && self.rules.breaks(Mutation::ResumeOnRefusal)
            && !terms().transferred(&row)
        {
            state.source = Source::Broken;
            return;
        }
        state.source = Source::Committing(commit.next(reply));
    }

    fn no_answer(&self, state: &mut State) {
        if self.rules.breaks(Mutation::ResumeOnNoAnswer) {
            state.source = Source::Broken;
        } else if let Source::Committing(commit) = state.source {
            state.source = Source::Committing(commit.next(Reply::NoAnswer));
            Self::ask(state);
        }
    }
}

fn terms() -> Terms {
    Terms {
        source: owner(SOURCE, 1),
        epoch: Epoch(1),
        destination: owner(DESTINATION, 1),
        attempt: ATTEMPT,
    }
}

impl Row {
    fn seen(self) -> OwnershipRecord {
        OwnershipRecord {
            owner: self.owner,
            epoch: self.epoch,
            attempt: self.attempt,
        }
    }
}

impl State {
    fn note_owner(&mut self) {
        let row = self.table.row();
        if let Some(owner) = row.owner {
            let slot = *self.owners.entry(row.epoch).or_insert(owner.slot);
            self.two_owners |= slot != owner.slot;
        }
    }

    fn source_runs(&self) -> bool {
        matches!(
            self.source,
            Source::Unasked | Source::Broken | Source::Committing(Commit::Resumed { .. })
        )
    }

    /// The source will never run again.
    fn source_is_gone(&self) -> bool {
        matches!(
            self.source,
            Source::Committing(Commit::Committed { .. } | Commit::Lost)
        )
    }

    fn has_question(&self) -> bool {
        match self.source {
            Source::Committing(commit) => commit.request().is_some(),
            _ => false,
        }
    }

    fn committed(&self) -> bool {
        self.owners.values().any(|slot| slot.0 == DESTINATION)
    }
}

impl Model for HandOverModel {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let mut state = State {
            table: Table::new(2, Fencing::Watchdog),
            source: Source::Paused,
            requests: Vec::new(),
            answer: None,
            requests_sent: 0,
            losses_left: self.losses,
            destination_alive: true,
            destination_runs: false,
            owners: BTreeMap::new(),
            two_owners: false,
        };
        state.note_owner();
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.source == Source::Paused {
            actions.extend([Action::Ask, Action::GiveUp, Action::Cancel]);
        }
        if state.has_question() && state.requests_sent < self.requests {
            actions.push(Action::NoAnswer);
        }
        actions.extend((0..state.requests.len()).map(Action::Decide));
        if state.answer.is_some() {
            actions.push(Action::Answer);
        }
        if state.losses_left > 0 {
            actions.extend((0..state.requests.len()).map(Action::LoseRequest));
            if state.answer.is_some() {
                actions.push(Action::LoseAnswer);
            }
        }
        if !state.destination_runs {
            actions.push(Action::DestinationLooks);
        }
        actions.push(if state.destination_alive {
            Action::DestinationSeemsDead
        } else {
            Action::DestinationSeemsAlive
        });
        if state.table.generation(SOURCE) == 1 {
            actions.push(Action::SourceRejoins);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Ask => {
                state.source = Source::Committing(Commit::begin(terms(), RETRACTION));
                Self::ask(&mut state);
            }
            Action::GiveUp => {
                state.source = Source::Committing(Commit::give_up(terms(), RETRACTION));
                Self::ask(&mut state);
            }
            Action::Cancel => state.source = Source::Unasked,
            Action::NoAnswer => self.no_answer(&mut state),
            Action::Decide(index) => self.decide(&mut state, index),
            Action::LoseRequest(index) => {
                state.losses_left -= 1;
                state.requests.remove(index);
            }
            Action::Answer => {
                self.answer(&mut state);
                if state.requests_sent < self.requests {
                    Self::ask(&mut state);
                }
            }
            Action::LoseAnswer => {
                state.losses_left -= 1;
                state.answer = None;
            }
            Action::DestinationLooks => {
                let row = state.table.row();
                state.destination_runs = row.owner == Some(owner(DESTINATION, 1));
            }
            Action::DestinationSeemsDead => state.destination_alive = false,
            Action::DestinationSeemsAlive => state.destination_alive = true,
            Action::SourceRejoins => {
                let witness = TestWitness {
                    alive: |_| true,
                    over: |_| Err(MissingProof::Alive),
                    proof: |_| Err(MissingProof::Alive),
                };
                let (from, to) = (owner(SOURCE, 1), owner(SOURCE, 2));
                let answer = state
                    .table
                    .ask(&rejoin(from, false), (to, 1), &witness, self.rules);
                assert!(answer.is_ok(), "{answer:?}");
            }
        }
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONE_RUNS, |_, state: &State| {
                !(state.source_runs() && state.destination_runs)
            }),
            Property::always(NEVER_AGAIN, |_, state: &State| {
                !(state.source_runs() && state.committed())
            }),
            Property::always(ONE_OWNER, |_, state: &State| !state.two_owners),
            Property::always(NOT_LOST, |_, state: &State| {
                !state.source_is_gone() || state.committed()
            }),
            Property::sometimes("the guest goes over", |_, state: &State| {
                state.destination_runs && state.source_is_gone()
            }),
            Property::sometimes(
                "the guest stays after a cancellation",
                |_, state: &State| state.source == Source::Unasked,
            ),
            Property::sometimes("the guest is retracted", |_, state: &State| {
                matches!(
                    state.source,
                    Source::Committing(Commit::Resumed {
                        epoch: Epoch(2),
                        ..
                    })
                )
            }),
        ]
    }
}

/// I2.
pub(crate) const ONE_RUNS: &str = "source and destination never run together";
/// I2.
pub(crate) const NEVER_AGAIN: &str = "after the commit the source never runs again";
/// I1.
pub(crate) const ONE_OWNER: &str = "an epoch has one owner";
/// I5.
pub(crate) const NOT_LOST: &str = "the source gives up a guest only after the commit";

#[test]
fn i2_i5_the_guest_runs_on_exactly_one_side_however_the_commit_ends() {
    let size = Size::from_environment();
    holds("hand-over", HandOverModel::new(Rules::ENFORCED, size));
}
