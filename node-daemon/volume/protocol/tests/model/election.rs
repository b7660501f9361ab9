//! Two or three processes elect coordinators, epoch after epoch, on one disk.
//!
//! Each slot is read at a different moment. Writes fail, and land late or never. Processes crash and
//! start again: in the same generation, with what their predecessor recorded of its writes, or after a
//! reset of the node in a new one. What was in flight at the crash is waited for; what failed is not, as
//! long as the node was not reset.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bascule_types::{BootTime, Generation, Owner, SlotId};
use bascule_volume_format::{CoordinatorEpoch, LeaderBlock, PaxosBlock, SlotPart};
use bascule_volume_protocol::{
    Election, ElectionCommand, ElectionConfig, ElectionEvent, ElectionOutcome, ElectionPhase,
    OutstandingWrites, Predecessor, Rules,
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
    /// Epochs that a process began to coordinate.
    begun: BTreeSet<CoordinatorEpoch>,
    begun_twice: bool,
    crashes_left: u8,
    failures_left: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Process {
    /// Rises with every reset of the node, and only then.
    generation: u64,
    /// Outlives the process.
    recorded: OutstandingWrites,
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
    /// The generation in which it was submitted.
    generation: u64,
    /// Whether a running process waits for the completion.
    awaited: bool,
    /// Whether it was reported as failed.
    failed: bool,
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
    Reset(u16),
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
        match event {
            ElectionEvent::Written => process.recorded.end(),
            ElectionEvent::Failed => process.recorded.fail(),
            _ => {}
        }
        let (election, command) = election.next(event);
        process.election = Some(election);
        let what = match command {
            None => return,
            Some(ElectionCommand::ReadBlocks) => {
                process.reading = Some(Reading::default());
                return;
            }
            Some(ElectionCommand::Done(outcome)) => {
                match outcome {
                    ElectionOutcome::Elected(epoch, winner) => {
                        state.decided.insert((epoch, winner));
                    }
                    ElectionOutcome::Won(epoch) => {
                        state.begun_twice |= !state.begun.insert(epoch);
                    }
                    _ => {}
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
        process.recorded.submit((SlotId(slot), what.part()));
        state.in_flight.push(Write {
            slot,
            what,
            generation: process.generation,
            awaited: true,
            failed: false,
        });
    }

    fn restart(&self, state: &mut State, slot: u16, predecessor: Predecessor) {
        let process = &mut state.processes[usize::from(slot)];
        let recorded = std::mem::take(&mut process.recorded);
        process.recorded = recorded.inherit(self.rules, predecessor);
        let config = self.config(slot, process.generation);
        let barred = process.recorded.barred(SlotId(slot));
        process.election = Some(Election::new(config, &barred));
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

impl Block {
    fn part(self) -> SlotPart {
        match self {
            Self::Paxos(subsector, _) => SlotPart::Paxos(subsector),
            Self::Leader(_) => SlotPart::Leader,
        }
    }
}

fn owner(slot: u16, generation: u64) -> Owner {
    Owner {
        slot: SlotId(slot),
        generation: Generation(generation),
    }
}

impl State {
    /// Whether a write of an earlier process of the slot is in flight that was not reported as failed, or
    /// any of an earlier boot.
    fn is_unsettled(&self, slot: u16) -> bool {
        let generation = self.processes[usize::from(slot)].generation;
        let unsettled = |write: &Write| {
            write.slot == slot
                && !write.awaited
                && !(write.failed && write.generation == generation)
        };
        self.in_flight.iter().any(unsettled)
    }
}

impl Model for ElectionModel {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let process = |slot| Process {
            generation: 1,
            recorded: OutstandingWrites::default(),
            election: Some(Election::new(self.config(slot, 1), &BTreeSet::new())),
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
            begun: BTreeSet::new(),
            begun_twice: false,
            crashes_left: self.crashes,
            failures_left: self.failures,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (slot, process) in (0..).zip(&state.processes) {
            let Some(election) = &process.election else {
                actions.extend([Action::Restart(slot), Action::Reset(slot)]);
                continue;
            };
            if process.reading.is_some() {
                actions.push(Action::ReadSlot(slot));
            }
            if election.phase() == ElectionPhase::Idle && process.attempts_left > 0 {
                actions.push(Action::Start(slot));
            }
            let idle = election.phase() == ElectionPhase::Idle;
            let forgets = process.recorded != OutstandingWrites::default();
            if state.crashes_left > 0 && (!idle || forgets) {
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
                let unsettled = state.is_unsettled(slot);
                let process = &mut state.processes[usize::from(slot)];
                process.attempts_left -= 1;
                if !unsettled {
                    process.recorded.settle();
                }
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
                state.in_flight[index].failed = true;
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
            Action::Restart(slot) => self.restart(&mut state, slot, Predecessor::Complete),
            Action::Reset(slot) => {
                state.processes[usize::from(slot)].generation += 1;
                self.restart(&mut state, slot, Predecessor::OfEarlierBoot);
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
            Property::always(BEGUN, |_, state: &State| !state.begun_twice),
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

/// Two journals of one epoch could not be told apart.
pub(crate) const BEGUN: &str = "every epoch is begun once";

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

/// Regression: a process did not know which writes of its predecessor had failed, and wrote the same
/// blocks again.
#[test]
fn i2_every_coordinator_epoch_has_one_winner_when_writes_fail_and_processes_restart() {
    let model = ElectionModel {
        crashes: 1,
        failures: 1,
        ..ElectionModel::new(Rules::ENFORCED, Size::from_environment())
    };
    holds("election with failing writes and crashes", model);
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
