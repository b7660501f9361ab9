//! Two or three processes elect coordinators, epoch after epoch, on one disk.
//!
//! Each slot is read at a different moment. Processes crash and restart in a new generation; their
//! outstanding writes land late or never. Writes fail, and may land nevertheless.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bascule_types::{BootTime, Generation, Owner, SlotId};
use bascule_volume_format::{CoordinatorEpoch, LeaderBlock, PaxosBlock};
use bascule_volume_protocol::{
    Election, ElectionCommand, ElectionConfig, ElectionEvent, ElectionOutcome, ElectionPhase, Rules,
};
use stateright::{Model, Property};

use crate::checker::{Size, holds};

const SETTLE: Duration = Duration::from_nanos(5);

#[derive(Clone, Debug)]
pub(crate) struct ElectionModel {
    pub(crate) rules: Rules,
    pub(crate) slots: u16,
    pub(crate) attempts: u8,
    pub(crate) crashes: u8,
    pub(crate) failures: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    processes: Vec<Process>,
    disk: BTreeMap<(u16, u64), PaxosBlock>,
    leaders: BTreeMap<u16, LeaderBlock>,
    in_flight: Vec<Write>,
    decided: BTreeSet<(CoordinatorEpoch, Owner)>,
    /// The highest epoch whose leader block was ever durable.
    led: CoordinatorEpoch,
    crashes_left: u8,
    failures_left: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Process {
    generation: u64,
    election: Option<Election>,
    attempts_left: u8,
    reading: Option<Reading>,
}

/// A read of all slots, in progress.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Reading {
    next: u16,
    paxos: Vec<PaxosBlock>,
    leaders: Vec<LeaderBlock>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Write {
    slot: u16,
    what: Block,
    /// Whether a running process waits for the completion.
    awaited: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Block {
    Paxos(u64, PaxosBlock),
    Leader(LeaderBlock),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    Start(u16),
    ReadSlot(u16),
    Land(usize),
    Drop(usize),
    Fail(usize),
    Crash(u16),
    Restart(u16),
}

impl ElectionModel {
    pub(crate) fn new(rules: Rules, size: Size) -> Self {
        Self {
            rules,
            slots: 2,
            attempts: 2,
            crashes: size.pick(1, 2),
            failures: 0,
        }
    }

    fn config(&self, slot: u16, generation: u64) -> ElectionConfig {
        ElectionConfig {
            me: owner(slot, generation),
            slots: self.slots,
            quiet_since: BootTime(0),
            settle: SETTLE,
            rules: self.rules,
        }
    }

    fn deliver(&self, state: &mut State, slot: u16, event: &ElectionEvent) {
        let process = &mut state.processes[usize::from(slot)];
        let Some(election) = process.election.take() else {
            return;
        };
        let (election, command) = election.next(event);
        process.election = Some(election);
        let what = match command {
            None => return,
            Some(ElectionCommand::ReadBlocks) => {
                process.reading = Some(Reading::default());
                return;
            }
            Some(ElectionCommand::Done(outcome)) => {
                if let ElectionOutcome::Elected(epoch, winner) = outcome {
                    state.decided.insert((epoch, winner));
                }
                return;
            }
            Some(ElectionCommand::WritePaxos { subsector, block }) => {
                Block::Paxos(subsector, block)
            }
            Some(ElectionCommand::WriteLeader(leader)) => {
                state.decided.insert((leader.epoch, leader.coordinator));
                Block::Leader(leader)
            }
        };
        state.in_flight.push(Write {
            slot,
            what,
            awaited: true,
        });
    }

    fn land(&self, state: &mut State, index: usize) {
        let write = state.in_flight.remove(index);
        match write.what {
            Block::Paxos(subsector, block) => {
                state.disk.insert((write.slot, subsector), block);
            }
            Block::Leader(leader) => {
                state.leaders.insert(write.slot, leader);
                state.led = state.led.max(leader.epoch);
            }
        }
        if write.awaited {
            self.deliver(state, write.slot, &ElectionEvent::Written);
        }
    }

    fn read_slot(&self, state: &mut State, slot: u16) {
        let process = &mut state.processes[usize::from(slot)];
        let Some(mut reading) = process.reading.take() else {
            return;
        };
        let blocks = state.disk.iter().filter(|((s, _), _)| *s == reading.next);
        reading.paxos.extend(blocks.map(|(_, block)| *block));
        reading.leaders.extend(state.leaders.get(&reading.next));
        reading.next += 1;
        if reading.next < self.slots {
            process.reading = Some(reading);
            return;
        }
        let Reading { paxos, leaders, .. } = reading;
        self.deliver(state, slot, &ElectionEvent::Blocks { paxos, leaders });
    }
}

fn owner(slot: u16, generation: u64) -> Owner {
    Owner {
        slot: SlotId(slot),
        generation: Generation(generation),
    }
}

impl State {
    /// Whether a write of an earlier process of the slot may still land.
    fn is_unsettled(&self, slot: u16) -> bool {
        self.in_flight.iter().any(|w| w.slot == slot && !w.awaited)
    }
}

impl Model for ElectionModel {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let process = |slot| Process {
            generation: 1,
            election: Some(Election::new(self.config(slot, 1))),
            attempts_left: self.attempts,
            reading: None,
        };
        vec![State {
            processes: (0..self.slots).map(process).collect(),
            disk: BTreeMap::new(),
            leaders: BTreeMap::new(),
            in_flight: Vec::new(),
            decided: BTreeSet::new(),
            led: CoordinatorEpoch(0),
            crashes_left: self.crashes,
            failures_left: self.failures,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (slot, process) in (0..).zip(&state.processes) {
            let Some(election) = &process.election else {
                actions.push(Action::Restart(slot));
                continue;
            };
            if process.reading.is_some() {
                actions.push(Action::ReadSlot(slot));
            }
            if election.phase() == ElectionPhase::Idle && process.attempts_left > 0 {
                actions.push(Action::Start(slot));
            }
            if state.crashes_left > 0 && election.phase() != ElectionPhase::Idle {
                actions.push(Action::Crash(slot));
            }
        }
        for (index, write) in state.in_flight.iter().enumerate() {
            actions.push(Action::Land(index));
            if !write.awaited {
                actions.push(Action::Drop(index));
            } else if state.failures_left > 0 {
                actions.push(Action::Fail(index));
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Start(slot) => {
                let process = &mut state.processes[usize::from(slot)];
                process.attempts_left -= 1;
                // The state machine itself accounts for failed writes of the present process.
                let unsettled = process.generation > 1 && state.is_unsettled(slot);
                let now = BootTime(if unsettled { 0 } else { 5 });
                self.deliver(&mut state, slot, &ElectionEvent::Start { now });
            }
            Action::ReadSlot(slot) => self.read_slot(&mut state, slot),
            Action::Land(index) => self.land(&mut state, index),
            Action::Drop(index) => {
                state.in_flight.remove(index);
            }
            Action::Fail(index) => {
                state.failures_left -= 1;
                state.in_flight[index].awaited = false;
                let slot = state.in_flight[index].slot;
                self.deliver(&mut state, slot, &ElectionEvent::Failed);
            }
            Action::Crash(slot) => {
                state.crashes_left -= 1;
                let process = &mut state.processes[usize::from(slot)];
                process.election = None;
                process.reading = None;
                for write in &mut state.in_flight {
                    write.awaited &= write.slot != slot;
                }
            }
            Action::Restart(slot) => {
                let process = &mut state.processes[usize::from(slot)];
                process.generation += 1;
                let config = self.config(slot, process.generation);
                process.election = Some(Election::new(config));
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(AGREED, |_, state: &State| {
                let epochs = state.decided.iter().map(|(epoch, _)| epoch);
                epochs.collect::<BTreeSet<_>>().len() == state.decided.len()
            }),
            Property::always(LED, |_, state: &State| {
                let shown = state.leaders.values().map(|leader| leader.epoch).max();
                shown.unwrap_or_default() == state.led
            }),
            Property::sometimes("a second epoch is led", |_, state: &State| {
                state.led == CoordinatorEpoch(2)
            }),
            Property::sometimes(
                "a process learns that another was elected",
                |_, state: &State| {
                    let winner = state.decided.iter().next().map(|(_, winner)| winner.slot);
                    winner.is_some_and(|winner| !state.leaders.contains_key(&winner.0))
                        && state.in_flight.is_empty()
                },
            ),
        ]
    }
}

/// I2.
pub(crate) const AGREED: &str = "every epoch has one winner";
/// A late write of a leader block must not overwrite a later epoch.
pub(crate) const LED: &str = "the highest epoch that was ever led is shown";

#[test]
fn i2_every_coordinator_epoch_has_one_winner() {
    let size = Size::from_environment();
    holds("election", ElectionModel::new(Rules::ENFORCED, size));
}

#[test]
fn i2_every_coordinator_epoch_has_one_winner_when_writes_fail() {
    let model = ElectionModel {
        crashes: 0,
        failures: 1,
        ..ElectionModel::new(Rules::ENFORCED, Size::from_environment())
    };
    holds("election with failing writes", model);
}

#[test]
fn i2_every_coordinator_epoch_has_one_winner_among_three() {
    let model = ElectionModel {
        slots: 3,
        attempts: 1,
        crashes: 0,
        ..ElectionModel::new(Rules::ENFORCED, Size::Small)
    };
    holds("election of three", model);
}
