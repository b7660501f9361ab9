//! One holder, one watcher, one slot, two drifting clocks.
//!
//! The holder's process crashes, restarts from the gate page, and freezes (it gets no event while time
//! passes); its writes land and are acknowledged at any time. A record of a newer generation may
//! appear in its slot, as a second process of the node would write it. Reads fail; writes fail, and land at
//! any later time, when their block of the ring has been written again, or never. The holder may leave.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bascule_types::{BootTime, Generation, NodeUid, Owner, SlotId};
use bascule_volume_format::{HEARTBEAT_RECORDS, Timings, WatchdogKind};
use bascule_volume_protocol::{
    Drift, HeartbeatSeen, Held, LeaseCommand, LeaseConfig, LeaseEvent, LeaseHolder, LeasePhase,
    Mutation, OwnRecord, Rules, StopReason, WatchEvent, Watcher,
};
use stateright::{Model, Property};

use crate::checker::{Size, holds};

const SLOT: SlotId = SlotId(0);
const NODE: NodeUid = NodeUid::from_bytes([1; 16]);
/// Clocks count 2 (slow) to 4 (fast) units per tick of true time: ρ = 1/3.
const DRIFT: Drift = Drift { rho_inverse: 3 };
const RATES: [u64; 2] = [2, 4];
/// The generation of the record that the node's second process writes.
const NEWER: u64 = 9;

#[derive(Clone, Debug)]
pub(crate) struct LeaseModel {
    pub(crate) rules: Rules,
    pub(crate) ticks: u64,
    pub(crate) sequences: u64,
    pub(crate) generations: u64,
    pub(crate) crashes: u8,
    pub(crate) newer_process: bool,
    /// How many reads and writes may fail.
    pub(crate) failures: u8,
    pub(crate) leaves: bool,
    /// How many blocks the slot has: records of as many sequences lie side by side.
    pub(crate) ring: u64,
}

/// Generation and sequence, and whether it is the last one of a holder that left.
type Record = (u64, u64, bool);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    real: u64,
    rate_holder: u64,
    rate_watcher: u64,
    holder: Option<LeaseHolder>,
    page: Option<Held>,
    page_sequence: u64,
    /// By block.
    disk: BTreeMap<u64, Record>,
    /// Submitted, not landed. A list: a broken rule may send one twice.
    in_flight: Vec<Record>,
    /// Failed, and not landed.
    failed: Vec<Record>,
    /// Landed, not acknowledged to the process that submitted it.
    unacknowledged: Vec<Record>,
    own_read: OwnRead,
    watcher: Watcher,
    watch_read: WatchRead,
    concluded: BTreeSet<Generation>,
    crashes_left: u8,
    newer_left: bool,
    failures_left: u8,
    has_left: bool,
    /// A failed write took the place of a later one.
    went_back: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum OwnRead {
    None,
    Issued,
    Sampled(Vec<Record>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum WatchRead {
    None,
    Issued(BootTime),
    Sampled(BootTime, Option<Record>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    TimePasses,
    HolderTick,
    HolderSample,
    HolderReadDone,
    Land(usize),
    Acknowledge(usize),
    ReadFails,
    WriteFails(usize),
    LandFailed(usize),
    Leave,
    NewGeneration,
    Crash,
    Restart,
    NewerProcessWrites,
    WatcherIssue,
    WatcherSample,
    WatcherReadDone,
}

impl LeaseModel {
    pub(crate) fn new(rules: Rules, size: Size) -> Self {
        Self {
            rules,
            ticks: size.pick(3, 4),
            sequences: size.pick(2, 3),
            generations: 2,
            crashes: 1,
            newer_process: false,
            failures: 0,
            leaves: false,
            ring: HEARTBEAT_RECORDS,
        }
    }

    fn timings(&self) -> Timings {
        let lease = Duration::from_nanos(4);
        let watch = if self.rules.breaks(Mutation::WatchWithoutDrift) {
            lease
        } else {
            DRIFT.watch_min(lease)
        };
        Timings {
            lease,
            watch,
            poll: Duration::from_nanos(1),
            renewal: Duration::from_nanos(1),
            watchdog: Duration::from_nanos(1),
            settle: Duration::from_nanos(1),
        }
    }

    fn start(&self, state: &State) -> LeaseHolder {
        let config = LeaseConfig {
            node: NODE,
            timings: self.timings(),
            rules: self.rules,
        };
        let on_disk = state.disk.values().map(|(_, sequence, _)| *sequence);
        let on_disk = on_disk.max().unwrap_or(0);
        let sequence = if self.rules.breaks(Mutation::SequenceFromDisk) {
            on_disk
        } else {
            on_disk.max(state.page_sequence)
        };
        LeaseHolder::start(config, state.holder_now(), state.page, sequence)
    }

    fn deliver(&self, state: &mut State, event: LeaseEvent) {
        let Some(holder) = state.holder.take() else {
            return;
        };
        let (holder, command) = holder.next(event);
        match command {
            Some(LeaseCommand::ReadOwnRecords) => state.own_read = OwnRead::Issued,
            Some(LeaseCommand::WriteRecord {
                owner,
                sequence,
                detached,
            }) => {
                state.page_sequence = state.page_sequence.max(sequence);
                state
                    .in_flight
                    .push((owner.generation.0, sequence, detached));
                state.in_flight.sort_unstable();
            }
            None => {}
        }
        state.page = holder.lease();
        state.has_left |= holder.phase() == LeasePhase::Stopped(StopReason::Left);
        state.holder = Some(holder);
    }

    /// Reads and writes that fail, and a holder that leaves.
    fn goes_wrong(&self, state: &mut State, action: Action) {
        let now = state.holder_now();
        match action {
            Action::ReadFails => {
                state.failures_left -= 1;
                state.own_read = OwnRead::None;
                self.deliver(state, LeaseEvent::ReadFailed { now });
            }
            Action::WriteFails(index) => {
                state.failures_left -= 1;
                let record = state.in_flight.remove(index);
                state.failed.push(record);
                state.failed.sort_unstable();
                let sequence = record.1;
                self.deliver(state, LeaseEvent::WriteFailed { now, sequence });
            }
            Action::LandFailed(index) => {
                let record = state.failed.remove(index);
                let before = state.disk.get(&(record.1 % self.ring));
                state.went_back |= before.is_some_and(|before| *before > record);
                state.land(record, self.ring);
            }
            Action::Leave => self.deliver(state, LeaseEvent::Leave { now }),
            _ => {}
        }
    }

    fn seen(&self, (generation, sequence, detached): Record) -> HeartbeatSeen {
        HeartbeatSeen {
            node: NODE,
            owner: owner(generation),
            sequence,
            watchdog: WatchdogKind::Hardware,
            detached,
            timings: self.timings(),
        }
    }

    fn watcher_read(&self, state: &mut State) {
        let WatchRead::Sampled(issued_at, newest) = state.watch_read else {
            return;
        };
        state.watch_read = WatchRead::None;
        state.watcher = state.watcher.clone().next(WatchEvent::Read {
            issued_at,
            completed_at: state.watcher_now(),
            slots: vec![(SLOT, newest.map(|record| self.seen(record)))],
        });
        for generation in (1..=self.generations).chain([NEWER]) {
            if state.watcher.evidence(owner(generation)).lease_is_over() {
                state.concluded.insert(Generation(generation));
            }
        }
    }
}

impl State {
    fn holder_now(&self) -> BootTime {
        BootTime(self.real * self.rate_holder)
    }

    fn watcher_now(&self) -> BootTime {
        BootTime(self.real * self.rate_watcher)
    }

    fn newest(&self) -> Option<Record> {
        self.disk.values().copied().max()
    }

    fn land(&mut self, record: Record, ring: u64) {
        self.disk.insert(record.1 % ring, record);
    }

    /// Whether a write would pass the gate now, and for whom.
    fn open_gate(&self) -> Option<Generation> {
        self.page
            .filter(|held| self.holder_now() < held.expiry)
            .map(|held| held.owner.generation)
    }
}

fn owner(generation: u64) -> Owner {
    Owner {
        slot: SLOT,
        generation: Generation(generation),
    }
}

impl Model for LeaseModel {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let mut states = Vec::new();
        for rate_holder in RATES {
            for rate_watcher in RATES {
                let mut state = State {
                    real: 0,
                    rate_holder,
                    rate_watcher,
                    holder: None,
                    page: None,
                    page_sequence: 0,
                    disk: BTreeMap::new(),
                    in_flight: Vec::new(),
                    failed: Vec::new(),
                    unacknowledged: Vec::new(),
                    own_read: OwnRead::None,
                    watcher: Watcher::new(self.rules),
                    watch_read: WatchRead::None,
                    concluded: BTreeSet::new(),
                    crashes_left: self.crashes,
                    newer_left: self.newer_process,
                    failures_left: self.failures,
                    has_left: false,
                    went_back: false,
                };
                state.holder = Some(self.start(&state));
                states.push(state);
            }
        }
        states
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.real < self.ticks {
            actions.push(Action::TimePasses);
        }
        actions.extend((0..state.in_flight.len()).map(Action::Land));
        actions.extend((0..state.failed.len()).map(Action::LandFailed));
        match &state.holder {
            Some(holder) => {
                if holder.sequence_sent() < self.sequences {
                    actions.push(Action::HolderTick);
                    if self.leaves {
                        actions.push(Action::Leave);
                    }
                }
                if state.failures_left > 0 {
                    actions.extend((0..state.in_flight.len()).map(Action::WriteFails));
                    if state.own_read != OwnRead::None {
                        actions.push(Action::ReadFails);
                    }
                }
                match state.own_read {
                    OwnRead::None => {}
                    OwnRead::Issued => actions.push(Action::HolderSample),
                    OwnRead::Sampled(_) => actions.push(Action::HolderReadDone),
                }
                actions.extend((0..state.unacknowledged.len()).map(Action::Acknowledge));
                if holder.phase() == LeasePhase::Lapsed {
                    actions.push(Action::NewGeneration);
                }
                if state.crashes_left > 0 {
                    actions.push(Action::Crash);
                }
            }
            None => actions.push(Action::Restart),
        }
        if state.newer_left {
            actions.push(Action::NewerProcessWrites);
        }
        actions.push(match state.watch_read {
            WatchRead::None => Action::WatcherIssue,
            WatchRead::Issued(_) => Action::WatcherSample,
            WatchRead::Sampled(..) => Action::WatcherReadDone,
        });
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        let now = state.holder_now();
        match action {
            Action::TimePasses => state.real += 1,
            Action::HolderTick => self.deliver(&mut state, LeaseEvent::Tick { now }),
            Action::HolderSample => {
                let records = state.disk.values().copied().collect();
                state.own_read = OwnRead::Sampled(records);
            }
            Action::HolderReadDone => {
                let read = std::mem::replace(&mut state.own_read, OwnRead::None);
                let OwnRead::Sampled(records) = read else {
                    return None;
                };
                let own = |(generation, sequence, _): Record| OwnRecord {
                    node: NODE,
                    owner: owner(generation),
                    sequence,
                };
                let records = records.into_iter().map(own).collect();
                self.deliver(&mut state, LeaseEvent::OwnRecords { now, records });
            }
            Action::Land(index) => {
                let record = state.in_flight.remove(index);
                state.land(record, self.ring);
                if state.holder.is_some() {
                    state.unacknowledged.push(record);
                    state.unacknowledged.sort_unstable();
                }
            }
            Action::Acknowledge(index) => {
                let (_, sequence, _) = state.unacknowledged.remove(index);
                self.deliver(&mut state, LeaseEvent::Written { now, sequence });
            }
            Action::NewGeneration => {
                let shown = state.newest().map_or(0, |(generation, ..)| generation);
                let paged = state.page.map_or(0, |held| held.owner.generation.0);
                let next = shown.max(paged) + 1;
                if next > self.generations {
                    return None;
                }
                let owner = owner(next);
                self.deliver(&mut state, LeaseEvent::NewGeneration { now, owner });
            }
            Action::Crash => {
                state.crashes_left -= 1;
                state.holder = None;
                state.own_read = OwnRead::None;
                state.unacknowledged.clear();
            }
            Action::Restart => state.holder = Some(self.start(&state)),
            Action::NewerProcessWrites => {
                state.newer_left = false;
                state.land((NEWER, 1, false), self.ring);
            }
            Action::WatcherIssue => state.watch_read = WatchRead::Issued(state.watcher_now()),
            Action::WatcherSample => {
                let WatchRead::Issued(issued_at) = state.watch_read else {
                    return None;
                };
                state.watch_read = WatchRead::Sampled(issued_at, state.newest());
            }
            Action::WatcherReadDone => self.watcher_read(&mut state),
            other => self.goes_wrong(&mut state, other),
        }
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(SAFE, |_, state: &State| {
                state
                    .open_gate()
                    .is_none_or(|generation| !state.concluded.contains(&generation))
            }),
            Property::sometimes("a lease is held", |_, state: &State| {
                state.open_gate().is_some()
            }),
            Property::sometimes("a lease is renewed", |_, state: &State| {
                let phase = state.holder.as_ref().map(LeaseHolder::phase);
                phase == Some(LeasePhase::Held) && state.page_sequence > 1
            }),
            Property::sometimes(
                "a watcher concludes that a lease has ended",
                |_, state: &State| !state.concluded.is_empty(),
            ),
        ];
        if self.leaves {
            let left = |_: &Self, state: &State| {
                state.has_left && state.disk.values().any(|(.., detached)| *detached)
            };
            properties.push(Property::sometimes("a holder has left", left));
        }
        if self.failures > 0 {
            properties.push(Property::sometimes(
                "a failed write landed on a later record",
                |_, state: &State| state.went_back,
            ));
        }
        if self.newer_process {
            properties.push(Property::sometimes(
                "a holder stops permanently",
                |_, state: &State| {
                    let phase = state.holder.as_ref().map(LeaseHolder::phase);
                    matches!(phase, Some(LeasePhase::Stopped(_)))
                },
            ));
        } else if self.generations > 1 {
            properties.push(Property::sometimes(
                "a lapsed holder holds a lease again",
                |_, state: &State| state.open_gate() == Some(Generation(2)),
            ));
        }
        properties
    }
}

/// I1.
pub(crate) const SAFE: &str = "no gate is open after a watcher concluded that its lease is over";

#[test]
fn i1_no_gate_is_open_after_a_watcher_concluded_that_its_lease_is_over() {
    let size = Size::from_environment();
    holds("lease", LeaseModel::new(Rules::ENFORCED, size));
}

#[test]
fn i1_a_second_process_in_the_slot_outlasts_no_conclusion() {
    let size = Size::from_environment();
    let model = LeaseModel {
        newer_process: true,
        generations: 1,
        crashes: 0,
        ..LeaseModel::new(Rules::ENFORCED, size)
    };
    holds("lease with a second process", model);
}

#[test]
fn i1_failed_writes_that_land_when_the_ring_has_wrapped_open_no_gate() {
    let size = Size::from_environment();
    // A ring of one wraps with every write.
    let model = LeaseModel {
        ring: 1,
        generations: 1,
        failures: 1,
        ..LeaseModel::new(Rules::ENFORCED, size)
    };
    holds("lease with failures in a ring of one", model);
}

#[test]
fn i1_a_node_that_leaves_outlasts_no_conclusion() {
    let size = Size::from_environment();
    let model = LeaseModel {
        leaves: true,
        generations: 1,
        ..LeaseModel::new(Rules::ENFORCED, size)
    };
    holds("lease that is left", model);
}
