//! One migration's commit: the source's machine, the real metadata, a coordinator that dies with
//! its answers, and a network that loses, delays, repeats and reorders.
//!
//! The destination runs when it sees its tenure. The source's node may go on in a new generation
//! meanwhile, the destination's lease may look lapsed, and the source may want to give up.

use std::collections::BTreeMap;

use bascule_types::{AttemptId, Epoch, SlotId};
use bascule_volume_format::Fencing;
use bascule_volume_format::change::{Answer, Change, MissingProof, Refusal, VmRow};
use bascule_volume_protocol::{
    HandOver, HandOverCommand, HandOverEvent, HandOverPhase, HandOverRequest, Rules,
};
use stateright::{Model, Property};

use crate::check::{Size, holds};
use crate::table::{Sight, Table, Tenure, VM, owner, rejoin};

const ATTEMPT: AttemptId = AttemptId::from_bytes([1; 16]);
const RECLAIM: AttemptId = AttemptId::from_bytes([2; 16]);
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
    source: HandOver,
    /// Requests under way, sorted.
    requests: Vec<Message>,
    /// Answers under way, sorted.
    answers: Vec<Reply>,
    requests_left: u8,
    losses_left: u8,
    destination_alive: bool,
    destination_runs: bool,
    /// Which slot owned each epoch.
    tenures: BTreeMap<Epoch, SlotId>,
    two_owners: bool,
}

/// A transfer to the destination, or back to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Message {
    attempt: AttemptId,
    generation: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Reply {
    attempt: AttemptId,
    outcome: Result<Tenure, Refusal>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    Ask,
    Cancel,
    NoAnswer,
    Decide(usize),
    LoseRequest(usize),
    Answer(usize),
    LoseAnswer(usize),
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

    fn source(state: &mut State, event: HandOverEvent) {
        let (source, command) = state.source.clone().next(event);
        state.source = source;
        let Some(HandOverCommand::Request(Change::Transfer { attempt, from, .. })) = command else {
            return;
        };
        state.requests_left = state.requests_left.saturating_sub(1);
        state.requests.push(Message {
            attempt,
            generation: from.generation.0,
        });
        state.requests.sort_unstable();
    }

    fn decide(&self, state: &mut State, index: usize) {
        let Message {
            attempt,
            generation,
        } = state.requests.remove(index);
        let to = if attempt == RECLAIM {
            owner(SOURCE, generation)
        } else {
            owner(DESTINATION, 1)
        };
        let change = Change::Transfer {
            vm: VM,
            from: owner(SOURCE, generation),
            epoch: Epoch(1),
            to,
            attempt,
        };
        let destination_alive = state.destination_alive;
        let sight = Sight {
            alive: |owner: bascule_types::Owner| owner.slot.0 == SOURCE || destination_alive,
            proof: |_| Err(MissingProof::Alive),
        };
        let asker = (owner(SOURCE, state.table.generation(SOURCE)), 1);
        let answer = state.table.ask(&change, asker, &sight, self.rules);
        let outcome = answer.map(|answer| match answer {
            Answer::Row(row) => Tenure {
                owner: row.owner,
                epoch: row.epoch,
                attempt: row.attempt,
            },
            other => panic!("a transfer was answered by {other:?}"),
        });
        state.answers.push(Reply { attempt, outcome });
        state.note_tenure();
    }

    fn answer(state: &mut State, index: usize) {
        let Reply { attempt, outcome } = state.answers.remove(index);
        let event = match outcome {
            Ok(tenure) => HandOverEvent::Granted(attempt, tenure.row()),
            Err(refusal) => HandOverEvent::Refused(attempt, refusal),
        };
        Self::source(state, event);
    }
}

impl Tenure {
    fn row(self) -> VmRow {
        VmRow {
            vm: VM,
            name: bascule_volume_format::change::RowName::new("default/web").unwrap(),
            owner: self.owner,
            epoch: self.epoch,
            attempt: self.attempt,
            spec_digest: [0; 32],
        }
    }
}

impl State {
    fn note_tenure(&mut self) {
        let tenure = self.table.tenure();
        if let Some(owner) = tenure.owner {
            let slot = *self.tenures.entry(tenure.epoch).or_insert(owner.slot);
            self.two_owners |= slot != owner.slot;
        }
    }

    fn source_runs(&self) -> bool {
        matches!(self.source.phase(), HandOverPhase::MayResume(_))
    }

    fn committed(&self) -> bool {
        self.tenures.values().any(|slot| slot.0 == DESTINATION)
    }
}

impl Model for HandOverModel {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let request = HandOverRequest {
            vm: VM,
            from: owner(SOURCE, 1),
            epoch: Epoch(1),
            to: owner(DESTINATION, 1),
            attempt: ATTEMPT,
            reclaim: RECLAIM,
            rules: self.rules,
        };
        let mut state = State {
            table: Table::new(2, Fencing::Watchdog),
            source: HandOver::new(request),
            requests: Vec::new(),
            answers: Vec::new(),
            requests_left: self.requests,
            losses_left: self.losses,
            destination_alive: true,
            destination_runs: false,
            tenures: BTreeMap::new(),
            two_owners: false,
        };
        state.note_tenure();
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let phase = state.source.phase();
        if phase == HandOverPhase::Paused {
            actions.extend([Action::Ask, Action::Cancel]);
        }
        if state.requests_left > 0 {
            match phase {
                HandOverPhase::Asked => actions.extend([Action::NoAnswer, Action::Cancel]),
                HandOverPhase::Reclaiming => actions.push(Action::NoAnswer),
                _ => {}
            }
        }
        actions.extend((0..state.requests.len()).map(Action::Decide));
        actions.extend((0..state.answers.len()).map(Action::Answer));
        if state.losses_left > 0 {
            actions.extend((0..state.requests.len()).map(Action::LoseRequest));
            actions.extend((0..state.answers.len()).map(Action::LoseAnswer));
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
            Action::Ask => Self::source(&mut state, HandOverEvent::Ask),
            Action::Cancel => Self::source(&mut state, HandOverEvent::Cancel),
            Action::NoAnswer => Self::source(&mut state, HandOverEvent::NoAnswer),
            Action::Decide(index) => self.decide(&mut state, index),
            Action::LoseRequest(index) => {
                state.losses_left -= 1;
                state.requests.remove(index);
            }
            Action::Answer(index) => Self::answer(&mut state, index),
            Action::LoseAnswer(index) => {
                state.losses_left -= 1;
                state.answers.remove(index);
            }
            Action::DestinationLooks => {
                let tenure = state.table.tenure();
                state.destination_runs = tenure.owner == Some(owner(DESTINATION, 1));
            }
            Action::DestinationSeemsDead => state.destination_alive = false,
            Action::DestinationSeemsAlive => state.destination_alive = true,
            Action::SourceRejoins => {
                let sight = Sight {
                    alive: |_| true,
                    proof: |_| Err(MissingProof::Alive),
                };
                let (from, to) = (owner(SOURCE, 1), owner(SOURCE, 2));
                let answer = state
                    .table
                    .ask(&rejoin(from, false), (to, 1), &sight, self.rules);
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
                state.source.phase() != HandOverPhase::Gone || state.committed()
            }),
            Property::sometimes("the guest goes over", |_, state: &State| {
                state.destination_runs && state.source.phase() == HandOverPhase::Gone
            }),
            Property::sometimes("the guest stays, unasked", |_, state: &State| {
                state.source.phase() == HandOverPhase::MayResume(Epoch(1))
            }),
            Property::sometimes("the guest is taken back", |_, state: &State| {
                state.source.phase() == HandOverPhase::MayResume(Epoch(2))
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
pub(crate) const NOT_LOST: &str = "a guest that nobody took is not given up";

#[test]
fn i2_i5_the_guest_runs_on_exactly_one_side_however_the_commit_ends() {
    let size = Size::from_environment();
    holds("hand-over", HandOverModel::new(Rules::ENFORCED, size));
}
