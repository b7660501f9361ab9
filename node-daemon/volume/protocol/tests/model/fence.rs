//! A takeover: node A with its guest's writes and its watchdog may fail; the coordinator, on node B,
//! takes the guest over.
//!
//! Every process of node A may stop for any time at any point, also between the gate check and the
//! submission. Writes land arbitrarily late while A runs, and within `settle` after its reset or
//! never. The watchdog device fires by itself. Node B reads A's slot, proves the fence, takes the VM
//! and writes at once. Reads and renewals are atomic here; `lease.rs` splits them.

mod enlistment;
mod schedules;

use std::time::Duration;

use bascule_types::{
    AdminConfirmation, BootTime, Change, Epoch, Generation, NodeUid, Owner, Ownership, Refusal,
    SlotId, VolumeId,
};
use bascule_volume_format::{Fencing, FencingPolicy, Timings, WatchdogKind};
use bascule_volume_protocol::fence::{self, FencePolicy};
use bascule_volume_protocol::watchdog_policy::{Decision, Enlisted, timeout_fits};
use bascule_volume_protocol::{
    Enlistment, HeartbeatSeen, Held, JoinClaim, LeaseCommand, LeaseConfig, LeaseEvent, LeaseHolder,
    LeasePhase, OwnRecord, OwnSlot, Rules, WatchEvent, WatchdogCall, Watcher, WriterEvent,
    WriterId, Writers, join_claim,
};
use stateright::{Model, Property};

use crate::table::{Table, TestWitness, VM, owner, rejoin};

const NODE_A: NodeUid = NodeUid::from_bytes([1; 16]);
/// The guest's process on node A.
const GUEST: WriterId = WriterId {
    vm: VM,
    pid: 1,
    started: 1,
};
const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);
const A: u16 = 0;
const B: u16 = 1;
/// One tick.
const TICK: u64 = 1_000_000;

#[derive(Clone, Debug)]
pub(crate) struct FenceModel {
    pub(crate) rules: Rules,
    pub(crate) ticks: u64,
    pub(crate) settle: u64,
    pub(crate) lease: u64,
    pub(crate) watch: u64,
    /// The volume's watchdog time.
    pub(crate) watchdog: u64,
    pub(crate) device_timeout: u64,
    pub(crate) kind: WatchdogKind,
    pub(crate) fencing: Fencing,
    pub(crate) power_cut: bool,
    pub(crate) reboots: u8,
    pub(crate) kill: bool,
    /// Whether deciding and petting are two steps of `bascule-watchdog`, or one.
    pub(crate) late_pets: bool,
    /// Whether `bascule-volume` refreshes the enlistment with the watchdog, a step of its own: it withdraws
    /// a volume whose lease has lapsed.
    pub(crate) withdraws: bool,
    /// Whether `bascule-watchdog` may not answer, for as long as the node is up.
    pub(crate) silent_watchdog: bool,
    /// Whether a write may fail: it lands later, or not.
    pub(crate) failing_writes: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    now: u64,
    a: NodeState,
    /// The newest record of A's slot: owner, sequence number, and the boot that wrote it.
    record: (Owner, u64, u8),
    /// The watchdog that this record names.
    named: WatchdogKind,
    /// The guest's outstanding writes, sorted: at most one of each boot of the node.
    flights: Vec<Flight>,
    /// The highest epoch of which a write took effect.
    written: Epoch,
    table: Table,
    watcher: Watcher,
    /// The epoch in which B wrote.
    b_wrote: Option<Epoch>,
    /// A manual fencing confirmation that was sent and not yet decided: A's generation.
    confirmation: Option<u64>,
    /// The generation that the administrator confirmed.
    confirmed: Option<u64>,
    confirmations_left: u8,
    overtaken: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum NodeState {
    Up(Box<Node>),
    /// Since this moment, after this boot.
    Down(u64, u8),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Node {
    boot: u8,
    booted_at: u64,
    holder: LeaseHolder,
    page: Option<Held>,
    guest: Guest,
    writers: Writers,
    enlistment: Enlistment,
    enlisted: Enlisted,
    /// `bascule-watchdog` does not answer; it pets as before.
    is_silent: bool,
    petted_at: u64,
    pet_pending: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Guest {
    None,
    Running(Ownership),
    /// A write passed the gate check and is not yet submitted.
    Checked(Ownership),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Flight {
    epoch: Epoch,
    /// Its node was reset: lands before this moment or never.
    lands_until: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    TimePasses,
    Renew,
    NewGeneration,
    Rejoin,
    GuestChecks,
    GuestSubmits,
    GuestReadsRow,
    GuestEnds,
    Lands(usize),
    WriteFails,
    Refreshes,
    WatchdogFallsSilent,
    WatchdogDecides,
    WatchdogPets,
    PowerCut,
    Reboot,
    AAcquires,
    BReads,
    BTakesOver,
    BAcquires,
    AdminConfirms,
    ConfirmationArrives,
}

impl FenceModel {
    /// L 2, W 5, watchdog 2, settle 1: T_safe 8.
    pub(crate) fn new(rules: Rules) -> Self {
        Self {
            rules,
            ticks: 9,
            settle: 1,
            lease: 2,
            watch: 5,
            watchdog: 2,
            device_timeout: 2,
            kind: WatchdogKind::Hardware,
            fencing: Fencing::Watchdog,
            power_cut: false,
            reboots: 0,
            kill: false,
            late_pets: true,
            withdraws: false,
            silent_watchdog: false,
            failing_writes: false,
        }
    }

    /// A node whose lease lapses and comes back, with a lease of 1, W 4, T_safe 7. Deciding and petting are
    /// one step: what this model adds is when the volume is watched.
    pub(crate) fn withdrawing(rules: Rules) -> Self {
        Self {
            ticks: 8,
            lease: 1,
            watch: 4,
            late_pets: false,
            withdraws: true,
            ..Self::new(rules)
        }
    }

    fn timings(&self) -> Timings {
        let ticks = |n: u64| Duration::from_nanos(n * TICK);
        Timings {
            lease: ticks(self.lease),
            watch: ticks(self.watch),
            poll: ticks(1),
            renewal: ticks(1),
            watchdog: ticks(self.watchdog),
            settle: ticks(self.settle),
        }
    }

    /// What A's heartbeat says about its watchdog.
    fn kind(&self) -> WatchdogKind {
        let timeout = Duration::from_nanos(self.device_timeout * TICK);
        if timeout_fits(self.rules, &self.timings(), timeout) {
            self.kind
        } else {
            WatchdogKind::None
        }
    }

    fn policy(&self) -> FencePolicy {
        FencePolicy {
            mode: self.fencing,
            allowed: FencingPolicy::default(),
            rules: self.rules,
        }
    }

    fn node(&self, now: u64, boot: u8) -> Node {
        let config = LeaseConfig {
            node: NODE_A,
            timings: self.timings(),
            rules: self.rules,
        };
        Node {
            boot,
            booted_at: now,
            holder: LeaseHolder::start(config, BootTime(now * TICK), None, 10 * u64::from(boot)),
            page: None,
            guest: Guest::None,
            writers: Writers::new(self.rules),
            enlistment: Enlistment::new(self.rules, self.fencing == Fencing::Watchdog),
            enlisted: Enlisted::new(self.rules),
            is_silent: false,
            petted_at: now,
            pet_pending: false,
        }
    }

    fn time_passes(&self, state: &mut State) {
        state.now += 1;
        let now = state.now;
        // A software watchdog that hangs with its kernel never fires.
        let fires = match &state.a {
            NodeState::Up(node) => {
                self.kind == WatchdogKind::Hardware && now >= node.petted_at + self.device_timeout
            }
            NodeState::Down(..) => false,
        };
        if fires {
            self.reset(state);
        }
        let may_land = |flight: &Flight| flight.lands_until.is_none_or(|until| now < until);
        state.flights.retain(may_land);
    }

    fn reset(&self, state: &mut State) {
        let NodeState::Up(node) = &state.a else {
            return;
        };
        for flight in &mut state.flights {
            flight.lands_until.get_or_insert(state.now + self.settle);
        }
        state.a = NodeState::Down(state.now, node.boot);
    }

    /// One renewal, from the tick to the acknowledgement.
    fn renew(state: &mut State) {
        let now = state.moment();
        let (owner, sequence, _) = state.record;
        let NodeState::Up(node) = &mut state.a else {
            return;
        };
        let own = OwnRecord {
            node: NODE_A,
            owner,
            sequence,
        };
        let records = vec![own];
        node.step(LeaseEvent::Tick { now });
        let command = node.step(LeaseEvent::OwnRecords { now, records });
        if let Some(LeaseCommand::WriteRecord {
            owner, sequence, ..
        }) = command
        {
            state.record = (owner, sequence, node.boot);
            state.named = node.enlistment.kind();
            let may_name_one = state.named != WatchdogKind::None;
            node.enlistment = node.enlistment.clone().published(may_name_one);
            node.step(LeaseEvent::Written { now, sequence });
        }
    }

    fn rejoin(&self, state: &mut State) {
        let NodeState::Up(node) = &state.a else {
            return;
        };
        let from = owner(A, state.table.generation(A));
        let since_boot = BootTime((state.now - node.booted_at) * TICK);
        // The slot's newest record may be of this boot already: the heartbeat precedes the rejoin.
        let own = OwnSlot {
            node: NODE_A,
            owner: from,
            boot: [state.record.2; 16],
        };
        let settle = self.timings().settle;
        let boot = [node.boot; 16];
        let rebooted = match join_claim(self.rules, since_boot, boot, NODE_A, Some(own), settle) {
            JoinClaim::SameBoot { .. } => false,
            JoinClaim::Rebooted { .. } => true,
            JoinClaim::First | JoinClaim::Wait { .. } => return,
        };
        let (requester, boot) = (state.record.0, node.boot);
        if requester.generation > from.generation
            && self
                .ask(state, &rejoin(from, rebooted), (requester, boot))
                .is_ok()
        {
            let now = state.moment();
            state.watcher = state.watcher.clone().next(WatchEvent::Granted {
                now,
                owner: requester,
            });
        }
    }

    fn ask(
        &self,
        state: &mut State,
        change: &Change,
        requester: (Owner, u8),
    ) -> Result<(), Refusal> {
        let (watcher, now) = (state.watcher.clone(), state.moment());
        let witness = TestWitness {
            alive: |owner: Owner| owner.slot.0 == B || watcher.is_alive(owner, now),
            over: |victim| {
                let watch = self.timings().watch;
                watcher.check_lease_over(victim, watch, now)
            },
            proof: |victim| fence::verify(self.policy(), &watcher.evidence(victim)),
        };
        let answer = state.table.ask(change, requester, &witness, self.rules);
        answer.map(|_| ())
    }

    fn guest_ends(&self, state: &mut State) {
        let drained = !state.is_writing();
        let now = state.moment();
        let NodeState::Up(node) = &mut state.a else {
            return;
        };
        let Guest::Running(Ownership { owner: from, epoch }) = node.guest else {
            return;
        };
        node.guest = Guest::None;
        let ended = if drained {
            WriterEvent::Closed
        } else {
            WriterEvent::Died
        };
        node.writers = node.writers.clone().next(GUEST, ended);
        let may_name_one = state.named != WatchdogKind::None;
        self.refreshes(node, now, may_name_one, !drained);
        let requester = (from, node.boot);
        if node.writers.is_drained(VM) {
            let change = Change::Release {
                vm: VM,
                from,
                epoch,
            };
            // A refusal means that another owner has the VM by now.
            self.ask(state, &change, requester).ok();
        }
    }

    /// A starts the guest again, enlisted with the watchdog and in a new epoch.
    fn a_acquires(&self, state: &mut State) {
        let NodeState::Up(node) = &state.a else {
            return;
        };
        let (to, boot) = (owner(A, state.table.generation(A)), node.boot);
        if !node.gate_is_open(state.moment(), to) {
            return;
        }
        let expected_epoch = state.table.row().epoch;
        let change = Change::Acquire {
            vm: VM,
            expected_epoch,
            to,
        };
        if self.ask(state, &change, (to, boot)).is_err() {
            return;
        }
        let epoch = state.table.row().epoch;
        let (now, may_name_one) = (state.moment(), state.named != WatchdogKind::None);
        if let NodeState::Up(node) = &mut state.a {
            node.writers = node.writers.clone().next(GUEST, WriterEvent::Opened);
            self.refreshes(node, now, may_name_one, false);
            node.guest = Guest::Running(Ownership::new(to, epoch));
        }
    }

    fn b_asks(&self, state: &mut State, change: &Change) {
        if self.ask(state, change, (owner(B, 1), 1)).is_ok() {
            let row = state.table.row();
            if row.owner == Some(owner(B, 1)) {
                state.b_wrote = Some(row.epoch);
                state.written = state.written.max(row.epoch);
            }
        }
    }

    fn b_takes_over(&self, state: &mut State) {
        let row = state.table.row();
        let (vm, epoch, to) = (VM, row.epoch, owner(B, 1));
        if let Some(from) = row.owner {
            let change = Change::TakeOver {
                vm,
                from,
                epoch,
                to,
            };
            self.b_asks(state, &change);
        }
    }

    fn b_acquires(&self, state: &mut State) {
        let change = Change::Acquire {
            vm: VM,
            expected_epoch: state.table.row().epoch,
            to: owner(B, 1),
        };
        self.b_asks(state, &change);
    }

    fn b_reads(&self, state: &mut State) {
        let (owner, sequence, _) = state.record;
        let seen = HeartbeatSeen {
            node: NODE_A,
            owner,
            sequence,
            watchdog: state.named,
            detached: false,
            timings: self.timings(),
        };
        let now = state.moment();
        state.watcher = state.watcher.clone().next(WatchEvent::Read {
            issued_at: now,
            completed_at: now,
            slots: vec![(SlotId(A), Some(seen))],
        });
    }
}

impl Node {
    fn step(&mut self, event: LeaseEvent) -> Option<LeaseCommand> {
        let (holder, command) = self.holder.clone().next(event);
        self.holder = holder;
        self.publish();
        command
    }

    /// A gate that may not open keeps showing the lease that has ended.
    fn publish(&mut self) {
        if self.enlistment.may_open(self.writers.must_be_watched()) {
            self.page = self.holder.lease();
        }
    }

    fn gate_is_open(&self, now: BootTime, owner: Owner) -> bool {
        self.page
            .is_some_and(|held| held.owner == owner && now < held.expiry)
    }
}

impl State {
    fn moment(&self) -> BootTime {
        BootTime(self.now * TICK)
    }

    fn lands(&mut self, index: usize) {
        let flight = self.flights.remove(index);
        self.overtaken |= self.written > flight.epoch;
        self.written = self.written.max(flight.epoch);
    }

    /// Whether the guest writes after its volume was withdrawn and enlisted again.
    fn is_writing_again(&self) -> bool {
        match &self.a {
            NodeState::Up(node) => {
                matches!(node.guest, Guest::Checked(own) if own.owner.generation > Generation(1))
            }
            NodeState::Down(..) => false,
        }
    }

    /// Whether a write of the node's present life is under way.
    fn is_writing(&self) -> bool {
        self.flights.iter().any(|f| f.lands_until.is_none())
    }

    fn guest_reads_row(&mut self) {
        let row = self.table.row();
        let NodeState::Up(node) = &mut self.a else {
            return;
        };
        node.guest = match (row.owner, node.guest) {
            (Some(owner), Guest::Running(own)) if owner.slot.0 == A && row.epoch == own.epoch => {
                Guest::Running(Ownership::new(owner, row.epoch))
            }
            _ => Guest::None,
        };
    }
}

impl Model for FenceModel {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let mut node = self.node(0, 1);
        node.writers = node.writers.next(GUEST, WriterEvent::Opened);
        node.enlisted = node.enlisted.enlist(VOLUME);
        let enlist = WatchdogCall::Enlist { lease_until: None };
        node.enlistment = node.enlistment.answered(enlist, Some(self.kind()));
        node.enlistment = node.enlistment.published(false);
        node.guest = Guest::Running(Ownership::new(owner(A, 1), Epoch(1)));
        let begin = LeaseEvent::NewGeneration {
            now: BootTime(0),
            owner: owner(A, 1),
        };
        assert_eq!(node.step(begin), None);
        let mut state = State {
            now: 0,
            a: NodeState::Up(Box::new(node)),
            record: (owner(A, 1), 1, 1),
            named: WatchdogKind::None,
            flights: Vec::new(),
            written: Epoch(0),
            table: Table::new(2, self.fencing),
            watcher: Watcher::new(self.rules),
            b_wrote: None,
            confirmation: None,
            confirmed: None,
            confirmations_left: u8::from(self.fencing == Fencing::LeaseOnly),
            overtaken: false,
        };
        Self::renew(&mut state);
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.now < self.ticks {
            actions.push(Action::TimePasses);
        }
        match &state.a {
            NodeState::Up(node) => {
                actions.push(Action::Renew);
                if node.holder.phase() == LeasePhase::Lapsed
                    && state.record.0.generation < Generation(2 + u64::from(self.reboots))
                {
                    actions.push(Action::NewGeneration);
                }
                actions.push(Action::Rejoin);
                match node.guest {
                    Guest::None if node.boot > 1 => actions.push(Action::AAcquires),
                    Guest::None => {}
                    Guest::Running(own) => {
                        if !state.is_writing() && node.gate_is_open(state.moment(), own.owner) {
                            actions.push(Action::GuestChecks);
                        }
                        actions.push(Action::GuestReadsRow);
                        if self.kill {
                            actions.push(Action::GuestEnds);
                        }
                    }
                    Guest::Checked(..) => actions.push(Action::GuestSubmits),
                }
                if self.kind == WatchdogKind::Hardware {
                    actions.push(if node.pet_pending {
                        Action::WatchdogPets
                    } else {
                        Action::WatchdogDecides
                    });
                }
                if self.power_cut {
                    actions.push(Action::PowerCut);
                }
                if self.withdraws {
                    actions.push(Action::Refreshes);
                }
                if self.silent_watchdog {
                    actions.push(Action::WatchdogFallsSilent);
                }
                if self.failing_writes && state.is_writing() {
                    actions.push(Action::WriteFails);
                }
            }
            NodeState::Down(since, boot) => {
                if *boot <= self.reboots {
                    actions.push(Action::Reboot);
                }
                if state.confirmations_left > 0 && state.now >= since + self.settle {
                    actions.push(Action::AdminConfirms);
                }
            }
        }
        actions.extend((0..state.flights.len()).map(Action::Lands));
        if state.b_wrote.is_none() {
            actions.extend([Action::BReads, Action::BTakesOver, Action::BAcquires]);
        }
        if state.confirmation.is_some() {
            actions.push(Action::ConfirmationArrives);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        let now = state.moment();
        match action {
            Action::TimePasses => self.time_passes(&mut state),
            Action::Renew => Self::renew(&mut state),
            Action::Rejoin => self.rejoin(&mut state),
            Action::GuestReadsRow => state.guest_reads_row(),
            Action::GuestEnds => self.guest_ends(&mut state),
            Action::Lands(index) => state.lands(index),
            Action::PowerCut => self.reset(&mut state),
            Action::BReads => self.b_reads(&mut state),
            Action::AAcquires => self.a_acquires(&mut state),
            Action::Reboot => {
                let NodeState::Down(_, boot) = state.a else {
                    return None;
                };
                state.a = NodeState::Up(Box::new(self.node(state.now, boot + 1)));
            }
            Action::BTakesOver => self.b_takes_over(&mut state),
            Action::BAcquires => self.b_acquires(&mut state),
            Action::AdminConfirms => {
                state.confirmations_left -= 1;
                state.confirmed = Some(state.record.0.generation.0);
                state.confirmation = state.confirmed;
            }
            Action::ConfirmationArrives => {
                let victim = owner(A, state.confirmation.take()?);
                let confirmation = AdminConfirmation::Confirmed;
                self.b_asks(
                    &mut state,
                    &Change::ConfirmFenced {
                        victim,
                        confirmation,
                    },
                );
            }
            Action::Refreshes | Action::WatchdogFallsSilent | Action::WriteFails => {
                self.on_watch(&mut state, action);
            }
            Action::NewGeneration
            | Action::GuestChecks
            | Action::GuestSubmits
            | Action::WatchdogDecides
            | Action::WatchdogPets => {
                let next = state.record.0.generation.next();
                let NodeState::Up(node) = &mut state.a else {
                    return None;
                };
                let submitted = self.on_node(node, action, now, owner(A, next.0));
                if let Some(epoch) = submitted {
                    state.flights.push(Flight {
                        epoch,
                        lands_until: None,
                    });
                    state.flights.sort_unstable();
                }
            }
        }
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(I1, |_, state: &State| !state.overtaken),
            Property::always(ONE_WRITER, |_, state: &State| {
                state.b_wrote != Some(Epoch(1))
            }),
            Property::always(FENCED_ENDS, |_, state: &State| {
                let row = state.table.row();
                row.epoch != Epoch(1)
                    || row.owner.is_none_or(|now| now.generation == Generation(1))
                    || !state.table.is_fenced(owner(A, 1))
            }),
            Property::always(CONFIRMATION_BOUND, |model: &Self, state: &State| {
                let fenced = |generation| state.table.is_fenced(owner(A, generation));
                model.fencing != Fencing::LeaseOnly
                    || (1..=3).all(|g| state.confirmed == Some(g) || !fenced(g))
            }),
            Property::sometimes("a write lands", |_, state: &State| {
                state.written == Epoch(1)
            }),
        ];
        if self.reboots > 0 {
            properties.push(Property::sometimes(
                "A writes again in a later epoch",
                |_, state: &State| state.b_wrote.is_none() && state.written > Epoch(1),
            ));
        }
        if self.withdraws {
            properties.push(Property::sometimes(
                "A is not reset and writes in a later generation",
                |_, state: &State| state.is_writing_again(),
            ));
        }
        if self.can_take_over() {
            properties.push(Property::sometimes(
                "B takes the guest",
                |_, state: &State| state.b_wrote.is_some(),
            ));
        } else {
            properties.push(Property::always(
                "no guest is taken over without a confirmation",
                |_, state: &State| state.b_wrote.is_none(),
            ));
        }
        properties
    }
}

impl FenceModel {
    /// A step of one of A's processes; the epoch of a write that it submitted.
    fn on_node(
        &self,
        node: &mut Node,
        action: Action,
        now: BootTime,
        next: Owner,
    ) -> Option<Epoch> {
        match (action, node.guest) {
            (Action::NewGeneration, _) => {
                node.step(LeaseEvent::NewGeneration { now, owner: next });
            }
            (Action::GuestChecks, Guest::Running(own)) => {
                node.guest = Guest::Checked(own);
            }
            (Action::GuestSubmits, Guest::Checked(own)) => {
                node.guest = Guest::Running(own);
                return Some(own.epoch);
            }
            (Action::WatchdogDecides, _) => {
                let expiry = node.page.map(|held| held.expiry);
                if node.enlisted.decide(now, |_| expiry) == Decision::Pet {
                    node.pet_pending = self.late_pets;
                    node.petted_at = now.0 / TICK;
                }
            }
            (Action::WatchdogPets, _) => {
                node.pet_pending = false;
                node.petted_at = now.0 / TICK;
            }
            _ => {}
        }
        None
    }

    fn can_take_over(&self) -> bool {
        self.kill
            || self.reboots > 0
            || self.fencing == Fencing::Watchdog && self.kind() == WatchdogKind::Hardware
    }
}

/// I1.
pub(crate) const I1: &str = "no write of an epoch lands after the first of a later one";
/// I1.
pub(crate) const ONE_WRITER: &str = "only A writes in the epoch that A owned";
/// A confirmation counts for the generation that the administrator named.
pub(crate) const CONFIRMATION_BOUND: &str =
    "under LeaseOnly only the confirmed generation is fenced";
/// I2.
pub(crate) const FENCED_ENDS: &str =
    "a fenced owner's ownership does not go over to its next generation";
