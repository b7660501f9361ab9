//! The restarts of `bascule-watchdog`: whatever ends when, the node is reset within W plus the
//! volume's watchdog time of its last renewal, before another node's takeover.
//!
//! Time is real here: one tick is a second, the times are the default ones, the device is one that
//! [`timeout_fits`] accepts. The node renews until an arbitrary second; then its lease expires. Like
//! the drivers of Linux, the device is petted by a write, by opening it and by closing its last
//! descriptor. Both processes that hold it end at any time, one after the other or together, and are
//! started again or not. One fault is left out, as the policy assumes: after a late pet both end.

use std::time::Duration;

use bascule_types::{BootTime, VolumeId};
use bascule_volume_format::Timings;
use bascule_volume_protocol::watchdog_policy::{Decision, Enlisted, Start, timeout_fits};
use bascule_volume_protocol::{Mutation, Rules};
use stateright::{Model, Property};

use crate::checker::{Size, holds};

const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);

#[derive(Clone, Debug)]
pub(crate) struct WatchdogModel {
    rules: Rules,
    timings: Timings,
    /// The device's timeout in seconds.
    timeout: u64,
    /// In seconds.
    ends_at: u64,
}

/// Times in seconds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    now: u64,
    renewed_at: u64,
    /// The storage failed or the node froze: no further renewal.
    heartbeat_lost: bool,
    petted_at: u64,
    is_reset: bool,
    process: Process,
    holder: bool,
    /// A pet after the expiry, or the end of both processes after it, was used.
    fault_used: bool,
}

/// `bascule-watchdog`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Process {
    Ended,
    /// Does not have the device.
    Waiting,
    /// Decided to open the device and has not yet.
    Opening,
    Running,
    /// Decided to pet and has not yet.
    Petting,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    TimePasses,
    Renew,
    LoseHeartbeat,
    Decides,
    Pets,
    ProcessEnds,
    ProcessStarts,
    HolderEnds,
    HolderStarts,
    BothEnd,
}

impl WatchdogModel {
    pub(crate) fn new(rules: Rules) -> Self {
        Self::with_timeout(rules, Timings::DEFAULT, 8)
    }

    /// With a device whose timeout is the volume's watchdog time, if the rules admit it.
    pub(crate) fn with_long_timeout(rules: Rules) -> Self {
        // Long enough for ticks of a second to show the difference.
        let timings = Timings {
            watchdog: Duration::from_secs(12),
            ..Timings::DEFAULT
        };
        Self::with_timeout(rules, timings, 12)
    }

    fn with_timeout(rules: Rules, timings: Timings, timeout: u64) -> Self {
        let model = Self {
            rules,
            timings,
            timeout,
            ends_at: 32,
        };
        let timeout = Duration::from_secs(model.timeout);
        assert!(timeout_fits(rules, &model.timings, timeout));
        model
    }

    /// A renewed lease expires after so many seconds.
    fn lease(&self) -> u64 {
        self.timings.lease.as_secs()
    }

    fn decision(&self, state: &State) -> Decision {
        let second = |at: u64| BootTime(0).after(Duration::from_secs(at));
        let expiry = second(state.renewed_at + self.lease());
        let enlisted = Enlisted::new(self.rules).enlist(VOLUME);
        enlisted.decide(second(state.now), |_| Some(expiry))
    }

    fn has_lapsed(&self, state: &State) -> bool {
        state.now >= state.renewed_at + self.lease()
    }

    fn two_hold(&self) -> bool {
        !self.rules.breaks(Mutation::NoSecondHolder)
    }

    /// A write, an opening or the last closing.
    fn pet(&self, state: &mut State) {
        state.fault_used |= self.has_lapsed(state);
        state.petted_at = state.now;
    }

    /// What the process does next, after it has started or while it waits.
    fn begin(&self, state: &State) -> Process {
        match Start::decide(self.rules, state.holder, self.decision(state)) {
            Start::Adopt => Process::Running,
            Start::Open => Process::Opening,
            Start::Wait(_) => Process::Waiting,
        }
    }

    fn decides(&self, state: &mut State) {
        state.process = match state.process {
            Process::Running if self.decision(state) == Decision::Pet => Process::Petting,
            Process::Waiting => self.begin(state),
            process => process,
        };
    }

    fn ends(&self, state: &mut State, process: bool, holder: bool) {
        let was_open = state.is_open();
        if process {
            state.process = Process::Ended;
        }
        if holder {
            state.holder = false;
        }
        if was_open && !state.is_open() {
            self.pet(state);
        }
    }

    /// Whether the end of the last descriptor is within the assumption.
    fn may_close(&self, state: &State) -> bool {
        !self.two_hold() || !state.fault_used
    }
}

impl State {
    fn is_open(&self) -> bool {
        self.holder || matches!(self.process, Process::Running | Process::Petting)
    }
}

impl Model for WatchdogModel {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            now: 0,
            renewed_at: 0,
            heartbeat_lost: false,
            petted_at: 0,
            is_reset: false,
            process: Process::Running,
            holder: self.two_hold(),
            fault_used: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.is_reset || state.now >= self.ends_at {
            return;
        }
        actions.push(Action::TimePasses);
        if !state.heartbeat_lost {
            actions.extend([Action::Renew, Action::LoseHeartbeat]);
        }
        match state.process {
            Process::Ended => actions.push(Action::ProcessStarts),
            Process::Petting | Process::Opening => actions.push(Action::Pets),
            Process::Running | Process::Waiting => actions.push(Action::Decides),
        }
        let closes = !state.holder && state.is_open();
        if state.process != Process::Ended && (!closes || self.may_close(state)) {
            actions.push(Action::ProcessEnds);
        }
        if state.holder {
            if state.process != Process::Ended || self.may_close(state) {
                actions.push(Action::HolderEnds);
            }
            if state.process != Process::Ended && self.may_close(state) {
                actions.push(Action::BothEnd);
            }
        } else if self.two_hold() && state.is_open() {
            actions.push(Action::HolderStarts);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::TimePasses => {
                state.now += 1;
                state.is_reset = state.now >= state.petted_at + self.timeout;
            }
            Action::Renew if self.has_lapsed(&state) => return None,
            Action::Renew => state.renewed_at = state.now,
            Action::LoseHeartbeat => state.heartbeat_lost = true,
            Action::Decides => self.decides(&mut state),
            Action::Pets => {
                self.pet(&mut state);
                state.process = Process::Running;
            }
            Action::ProcessEnds => self.ends(&mut state, true, false),
            Action::HolderEnds => self.ends(&mut state, false, true),
            Action::BothEnd => self.ends(&mut state, true, true),
            Action::ProcessStarts => state.process = self.begin(&state),
            Action::HolderStarts => state.holder = true,
        }
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(RESET_IN_TIME, |model: &Self, state: &State| {
                let limit = (model.timings.watch + model.timings.watchdog).as_secs();
                state.is_reset || state.now <= state.renewed_at + limit
            }),
            Property::sometimes(
                "a late pet or a last close is survived",
                |_, state: &State| state.is_reset && state.fault_used,
            ),
            Property::sometimes("a restarted process pets again", |_, state: &State| {
                state.process == Process::Petting && !state.holder && !state.heartbeat_lost
            }),
        ]
    }
}

/// What the safe time is built on.
pub(crate) const RESET_IN_TIME: &str =
    "a node that does not renew is reset within W and the volume's watchdog time";

#[test]
fn i1_the_node_is_reset_in_time_whenever_bascule_watchdog_ends_and_is_started_again() {
    let model = WatchdogModel {
        ends_at: Size::from_environment().pick(28, 36),
        ..WatchdogModel::new(Rules::ENFORCED)
    };
    holds("watchdog restarts", model);
}

/// Regression: killed 7.9 s after the expiry and started again 7.9 s later, it petted twice, and the
/// node was reset after the takeover.
#[test]
fn i1_a_kill_just_before_the_reset_and_a_restart_do_not_delay_it() {
    let model = WatchdogModel::new(Rules::ENFORCED);
    let mut state = model.init_states().remove(0);
    let step = |state: &mut State, action| {
        if let Some(next) = model.next_state(state, action) {
            *state = next;
        }
    };
    step(&mut state, Action::LoseHeartbeat);
    while !state.is_reset && state.now < model.ends_at {
        step(&mut state, Action::TimePasses);
        if matches!(state.now, 10 | 17) {
            step(&mut state, Action::ProcessEnds);
            step(&mut state, Action::ProcessStarts);
        }
        step(&mut state, Action::Decides);
        if matches!(state.process, Process::Petting | Process::Opening) {
            step(&mut state, Action::Pets);
        }
    }
    assert!(state.is_reset && state.now == 11, "{state:?}");
}
