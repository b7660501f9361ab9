//! A coordinator that is deposed while it journals, and its successor.
//!
//! The old coordinator's records, re-reads and answers take arbitrary time. The successor runs the
//! real election, reads the old journal after it has won, and crashes and restarts at any point.

use std::collections::BTreeSet;
use std::time::Duration;

use bascule_types::{BootTime, Generation, Owner, SlotId};
use bascule_volume_format::{CoordinatorEpoch, LeaderBlock, PaxosBlock};
use bascule_volume_protocol::{
    Coordinator, CoordinatorCommand, CoordinatorEvent, Election, ElectionCommand, ElectionConfig,
    ElectionEvent, ElectionOutcome, Mutation, Rules, Ticket,
};
use stateright::{Model, Property};

use crate::checker::{Size, holds};

#[derive(Clone, Debug)]
pub(crate) struct CoordinatorModel {
    pub(crate) rules: Rules,
    pub(crate) changes: u64,
    pub(crate) crashes: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    old: Option<Coordinator>,
    next_change: u64,
    /// Records of the old coordinator: submitted, and durable.
    submitted: BTreeSet<Ticket>,
    durable: BTreeSet<Ticket>,
    /// The old coordinator's re-read: issued, or sampled.
    reread: Option<Option<CoordinatorEpoch>>,
    acknowledged: BTreeSet<Ticket>,
    new: Successor,
    leaders: Vec<LeaderBlock>,
    paxos: Vec<PaxosBlock>,
    /// The records that the successor found in the old journal.
    adopted: Option<BTreeSet<Ticket>>,
    crashes_left: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Successor {
    election: Election,
    pending: Option<Pending>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Pending {
    Read,
    Paxos(PaxosBlock),
    Leader(LeaderBlock),
    Journal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    OldSubmits,
    OldDurable(Ticket),
    OldSamples,
    OldReadDone,
    OldReadFails,
    OldCrashes,
    NewStarts,
    NewProceeds,
    NewCrashes,
}

const OLD: CoordinatorEpoch = CoordinatorEpoch(1);

impl CoordinatorModel {
    pub(crate) fn new(rules: Rules, size: Size) -> Self {
        Self {
            rules,
            changes: size.pick(3, 5),
            crashes: size.pick(1, 2),
        }
    }

    fn election(&self, generation: u64) -> Election {
        let config = ElectionConfig {
            me: owner(1, generation),
            slots: 2,
            quiet_since: BootTime(0),
            settle: Duration::ZERO,
            rules: self.rules,
        };
        Election::new(config, &BTreeSet::new())
    }

    fn old(state: &mut State, event: CoordinatorEvent) {
        let Some(old) = state.old.take() else {
            return;
        };
        let (old, commands) = old.next(event);
        state.old = Some(old);
        for command in commands {
            match command {
                CoordinatorCommand::ReadLeader => state.reread = Some(None),
                CoordinatorCommand::Answer(tickets) => state.acknowledged.extend(tickets),
                CoordinatorCommand::Deposed(_) => {}
            }
        }
    }

    fn new_next(&self, state: &mut State, event: &ElectionEvent) {
        let (election, command) = state.new.election.clone().next(event);
        state.new.election = election;
        state.new.pending = match command {
            None => None,
            Some(ElectionCommand::ReadBlocks) => Some(Pending::Read),
            Some(ElectionCommand::WritePaxos { block, .. }) => Some(Pending::Paxos(block)),
            Some(ElectionCommand::WriteLeader(leader)) => {
                if self.rules.breaks(Mutation::ReadJournalBeforeLeaderDurable) {
                    state.adopted = Some(state.durable.clone());
                }
                Some(Pending::Leader(leader))
            }
            Some(ElectionCommand::Done(ElectionOutcome::Won(_))) => Some(Pending::Journal),
            Some(ElectionCommand::Done(_)) => None,
        };
    }

    fn new_proceeds(&self, state: &mut State) {
        match state.new.pending.take() {
            None => {}
            Some(Pending::Read) => {
                let (paxos, leaders) = (state.paxos.clone(), state.leaders.clone());
                self.new_next(state, &ElectionEvent::Blocks { paxos, leaders });
            }
            Some(Pending::Paxos(block)) => {
                state.paxos.push(block);
                self.new_next(state, &ElectionEvent::Written);
            }
            Some(Pending::Leader(leader)) => {
                state.leaders.push(leader);
                self.new_next(state, &ElectionEvent::Written);
            }
            Some(Pending::Journal) => {
                let found = state.durable.clone();
                state.adopted.get_or_insert(found);
            }
        }
    }
}

fn owner(slot: u16, generation: u64) -> Owner {
    Owner {
        slot: SlotId(slot),
        generation: Generation(generation),
    }
}

impl Model for CoordinatorModel {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            old: Some(Coordinator::new(OLD, self.rules)),
            next_change: 0,
            submitted: BTreeSet::new(),
            durable: BTreeSet::new(),
            reread: None,
            acknowledged: BTreeSet::new(),
            new: Successor {
                election: self.election(1),
                pending: None,
            },
            leaders: vec![LeaderBlock {
                epoch: OLD,
                coordinator: owner(0, 1),
            }],
            paxos: Vec::new(),
            adopted: None,
            crashes_left: self.crashes,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if let Some(old) = &state.old {
            if old.is_active() && state.next_change < self.changes {
                actions.push(Action::OldSubmits);
            }
            match state.reread {
                None => {}
                Some(None) => actions.push(Action::OldSamples),
                Some(Some(_)) => actions.extend([Action::OldReadDone, Action::OldReadFails]),
            }
            actions.push(Action::OldCrashes);
        }
        // Also after the old coordinator has crashed: a submitted write may land late.
        actions.extend(state.submitted.iter().map(|t| Action::OldDurable(*t)));
        match state.new.pending {
            Some(_) => actions.push(Action::NewProceeds),
            None if state.adopted.is_none() => actions.push(Action::NewStarts),
            None => {}
        }
        if state.crashes_left > 0 && state.new.pending.is_some() && state.adopted.is_none() {
            actions.push(Action::NewCrashes);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::OldSubmits => {
                state.submitted.insert(Ticket(state.next_change));
                state.next_change += 1;
            }
            Action::OldDurable(ticket) => {
                state.submitted.remove(&ticket);
                state.durable.insert(ticket);
                Self::old(&mut state, CoordinatorEvent::Durable(ticket));
            }
            Action::OldSamples => {
                let highest = state.leaders.iter().map(|leader| leader.epoch).max();
                state.reread = Some(highest);
            }
            Action::OldReadDone => {
                let highest = state.reread.take()??;
                Self::old(&mut state, CoordinatorEvent::Leader { highest });
            }
            Action::OldReadFails => {
                state.reread = None;
                Self::old(&mut state, CoordinatorEvent::LeaderReadFailed);
            }
            Action::OldCrashes => {
                state.old = None;
                state.reread = None;
            }
            Action::NewStarts => {
                let now = BootTime(0);
                self.new_next(&mut state, &ElectionEvent::Start { now });
            }
            Action::NewProceeds => self.new_proceeds(&mut state),
            Action::NewCrashes => {
                state.crashes_left -= 1;
                let generation = u64::from(self.crashes - state.crashes_left) + 1;
                state.new.election = self.election(generation);
                state.new.pending = None;
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(KEPT, |_, state: &State| {
                let adopted = state.adopted.as_ref();
                adopted.is_none_or(|adopted| state.acknowledged.is_subset(adopted))
            }),
            Property::sometimes("a change is acknowledged", |_, state: &State| {
                !state.acknowledged.is_empty()
            }),
            Property::sometimes(
                "the successor adopts an acknowledged change",
                |_, state: &State| {
                    let adopted = state.adopted.as_ref();
                    adopted.is_some() && !state.acknowledged.is_empty()
                },
            ),
            Property::sometimes(
                "a deposed coordinator's record lands late and is lost unacknowledged",
                |_, state: &State| {
                    let adopted = state.adopted.as_ref();
                    adopted.is_some_and(|adopted| !state.durable.is_subset(adopted))
                },
            ),
        ]
    }
}

/// I3.
pub(crate) const KEPT: &str = "an acknowledged change is never lost";

#[test]
fn i3_an_acknowledged_change_survives_the_coordinator() {
    let size = Size::from_environment();
    holds("coordinator", CoordinatorModel::new(Rules::ENFORCED, size));
}
