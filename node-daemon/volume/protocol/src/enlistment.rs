//! Whether the gates of a volume may open on this node, by what `bascule-watchdog` has answered.
//!
//! Runs in `bascule-volume`. `bascule-watchdog` has the other half, [`crate::watchdog_policy`].
//!
//! # States
//! ```text
//!   Unknown ──────────────── enlisted ──────────────► Enlisted ───┐
//!      │                        ▲                        ▲        │ no writer is left; or the lease
//!      │ cannot be enlisted     │                        │        │ has ended, every writer is drained
//!      ▼                        │                     enlisted    │ and its gate closed for certain
//!   Refused ── the newest record names no watchdog ──► Unwatched ─┤
//!      ▲                                                          ▼
//!      └──────────────── cannot be enlisted ──────────────── Withdrawn ── enlisted ──► Enlisted
//! ```
//! While a writer is open, a gate is opened, and a lease extended, in `Enlisted` and `Unwatched` only. In
//! `Unwatched` the heartbeat names no watchdog, so that no other node waits for a reset.
//!
//! # Why a lapsed volume is withdrawn
//! The watchdog resets a node so that a write that passed the gate does not land after the takeover. When no
//! write is in flight and every gate is closed, there is nothing to wait for, and a reset only ends guests
//! that would have gone on. The safe time stays a proof: a node that is not reset has nothing in flight,
//! and opens no gate before it is enlisted again.

use bascule_types::BootTime;
use bascule_volume_format::WatchdogKind;

use bascule_volume_format::{Rules, broken};

/// What `bascule-volume` knows of the enlistment of its volume.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Enlistment {
    rules: Rules,
    /// Whether the fencing mode of the volume relies on a watchdog.
    is_required: bool,
    state: State,
    kind: WatchdogKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    /// This process has not asked yet; an earlier one may have enlisted the volume and left gates open.
    Unknown,
    /// The volume may lapse without a reset.
    Withdrawn,
    /// `bascule-watchdog` did not enlist the volume.
    Refused,
    /// The node is reset when the lease lapses.
    Enlisted,
    /// No watchdog watches the lease, and no other node counts on one.
    Unwatched,
}

/// What the writers of the volume do at one moment, and the lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct WriterActivity {
    /// A writer has not closed.
    pub any: bool,
    /// No writer has a write in flight, and none has one that failed.
    pub drained: bool,
    /// The lease in the gate page ended so long ago that no writer takes it for valid.
    pub closed: bool,
    /// The end of the present lease, under which gates are open or about to open; none if it has ended.
    pub lease_until: Option<BootTime>,
}

/// A request to `bascule-watchdog`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WatchdogCall {
    /// Watch the lease of this volume.
    Enlist {
        /// The end of a lease that the gate page may not show yet.
        lease_until: Option<BootTime>,
    },
    /// Do not watch it.
    Withdraw,
}

impl Enlistment {
    /// At the start of the process. `is_required` says whether the volume's fencing mode relies on a
    /// watchdog; without it gates open whatever `bascule-watchdog` says.
    #[must_use]
    pub fn new(rules: Rules, is_required: bool) -> Self {
        Self {
            rules,
            is_required,
            state: State::Unknown,
            kind: WatchdogKind::None,
        }
    }

    /// The request to send now. One at a time; its answer goes to [`Enlistment::answered`].
    ///
    /// # Ordering
    /// A withdrawal closes the gates here, before it is sent: take `activity` and store the result while
    /// no other thread can publish a lease.
    #[must_use]
    pub fn decide(mut self, activity: &WriterActivity) -> (Self, WatchdogCall) {
        let drained = activity.drained || broken!(self.rules, WithdrawLapsedInFlight);
        let enlist = |lease_until| WatchdogCall::Enlist { lease_until };
        if !self.is_required || !activity.any {
            self.state = State::Withdrawn;
            return (self, WatchdogCall::Withdraw);
        }
        if activity.lease_until.is_some() {
            return (self, enlist(activity.lease_until));
        }
        let may_lapse = !broken!(self.rules, WithdrawOnlyClosed);
        if activity.closed && may_lapse && (drained || self.state == State::Withdrawn) {
            self.state = State::Withdrawn;
            return (self, WatchdogCall::Withdraw);
        }
        (self, enlist(None))
    }

    /// `answer` is the watchdog's kind if it granted the request; none if it refused, or did not answer.
    #[must_use]
    pub fn answered(mut self, call: WatchdogCall, answer: Option<WatchdogKind>) -> Self {
        let kind = answer.unwrap_or(WatchdogKind::None);
        let is_watched = kind != WatchdogKind::None;
        self.state = match (call, self.state) {
            (WatchdogCall::Enlist { .. }, _) if is_watched => State::Enlisted,
            (WatchdogCall::Enlist { .. }, State::Unknown | State::Withdrawn) => State::Refused,
            (_, state) => state,
        };
        // In `Unwatched` only a watchdog that watches the lease is named.
        let may_be_named = self.is_required && self.state != State::Unwatched;
        self.kind = if may_be_named {
            kind
        } else {
            WatchdogKind::None
        };
        self
    }

    /// The newest heartbeat record that other nodes may read names a watchdog, or none.
    #[must_use]
    pub fn published(mut self, may_name_one: bool) -> Self {
        let is_taken_back = !may_name_one || broken!(self.rules, UnwatchedWhileNamed);
        if self.state == State::Refused && is_taken_back {
            self.state = State::Unwatched;
        }
        self
    }

    /// Whether a writer may open: a watchdog watches this volume, or no record that other nodes may read
    /// names one.
    #[must_use]
    pub fn may_admit(&self, is_watched: bool, may_name_one: bool) -> bool {
        is_watched || !may_name_one || broken!(self.rules, OpenBeforePublished)
    }

    /// Whether a gate may be opened, or a lease extended. `any_writer`: a writer has not closed.
    #[must_use]
    pub fn may_open(&self, any_writer: bool) -> bool {
        let is_watched = matches!(self.state, State::Enlisted | State::Unwatched);
        !self.is_required
            || !any_writer
            || is_watched
            || broken!(self.rules, GateOpensBeforeEnlisting)
    }

    /// Whether the volume was withdrawn and not enlisted since.
    #[must_use]
    pub fn is_withdrawn(&self) -> bool {
        self.is_required && self.state == State::Withdrawn
    }

    /// What the heartbeat may say about the watchdog: the kind that resets this node should its lease
    /// lapse while a gate of it is open, or a write in flight.
    #[must_use]
    pub fn kind(&self) -> WatchdogKind {
        self.kind
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HARDWARE: Option<WatchdogKind> = Some(WatchdogKind::Hardware);
    const LEASE: Option<BootTime> = Some(BootTime(9));
    const WRITES: WriterActivity = WriterActivity {
        any: true,
        drained: false,
        closed: false,
        lease_until: LEASE,
    };
    /// Nothing in flight, the lease over.
    const STALLED: WriterActivity = WriterActivity {
        any: true,
        drained: true,
        closed: true,
        lease_until: None,
    };

    fn refreshed(
        enlistment: Enlistment,
        activity: &WriterActivity,
        answer: Option<WatchdogKind>,
    ) -> (Enlistment, WatchdogCall) {
        let (enlistment, call) = enlistment.decide(activity);
        (enlistment.answered(call, answer), call)
    }

    fn enlisted() -> Enlistment {
        let new = Enlistment::new(Rules::ENFORCED, true);
        assert!(!new.may_open(true) && new.may_open(false));
        let (enlisted, call) = refreshed(new, &WRITES, HARDWARE);
        assert_eq!(call, WatchdogCall::Enlist { lease_until: LEASE });
        assert!(enlisted.may_open(true));
        enlisted
    }

    fn withdrawn() -> Enlistment {
        let (withdrawn, call) = refreshed(enlisted(), &STALLED, HARDWARE);
        assert_eq!(call, WatchdogCall::Withdraw);
        withdrawn
    }

    #[test]
    fn i1_a_lapsed_volume_stays_enlisted_while_a_write_may_be_in_flight() {
        let in_flight = WriterActivity {
            drained: false,
            ..STALLED
        };
        let maybe_open = WriterActivity {
            closed: false,
            ..STALLED
        };
        for activity in [in_flight, maybe_open] {
            let (kept, call) = refreshed(enlisted(), &activity, HARDWARE);
            assert_eq!(call, WatchdogCall::Enlist { lease_until: None });
            assert_eq!(kept, enlisted());
        }
    }

    #[test]
    fn i1_a_withdrawn_volume_opens_no_gate_before_it_is_enlisted_again() {
        // Whatever becomes of the request: the gates are closed before it is sent.
        let (deciding, _) = enlisted().decide(&STALLED);
        assert!(!deciding.may_open(true));
        for answer in [HARDWARE, None] {
            let (withdrawn, call) = refreshed(enlisted(), &STALLED, answer);
            assert_eq!(call, WatchdogCall::Withdraw);
            assert!(!withdrawn.may_open(true));
            // A count that is raised for a moment, to look at the closed gate, changes nothing.
            let looks = WriterActivity {
                drained: false,
                ..STALLED
            };
            let (still, call) = refreshed(withdrawn.clone(), &looks, answer);
            assert_eq!((still, call), (withdrawn.clone(), WatchdogCall::Withdraw));
            let back = WriterActivity {
                lease_until: LEASE,
                ..STALLED
            };
            let (again, call) = refreshed(withdrawn, &back, HARDWARE);
            assert_eq!(call, WatchdogCall::Enlist { lease_until: LEASE });
            assert!(again.may_open(true) && again.kind() == WatchdogKind::Hardware);
        }
    }

    #[test]
    fn i1_gates_open_unwatched_only_when_no_record_names_a_watchdog_any_more() {
        for no_watchdog in [None, Some(WatchdogKind::None)] {
            let (refused, _) = refreshed(withdrawn(), &WRITES, no_watchdog);
            assert_eq!(refused.kind(), WatchdogKind::None);
            assert!(!refused.clone().published(true).may_open(true));
            let unwatched = refused.published(false);
            assert!(unwatched.may_open(true));
            // It is named again only once it watches.
            let (still, _) = refreshed(unwatched.clone(), &WRITES, no_watchdog);
            assert_eq!(still, unwatched);
            let (enlisted, _) = refreshed(unwatched, &WRITES, HARDWARE);
            assert_eq!(enlisted.kind(), WatchdogKind::Hardware);
        }
        // Records do not make a volume unwatched that was never refused.
        assert!(!withdrawn().published(false).may_open(true));
    }

    #[test]
    fn i1_a_writer_opens_only_watched_or_when_no_record_names_a_watchdog() {
        let new = Enlistment::new(Rules::ENFORCED, true);
        assert!(new.may_admit(true, true) && new.may_admit(false, false));
        assert!(!new.may_admit(false, true));
    }

    #[test]
    fn an_enlisted_volume_stays_open_while_its_watchdog_does_not_answer() {
        let (silent, _) = refreshed(enlisted(), &WRITES, None);
        assert!(silent.may_open(true));
        assert_eq!(silent.kind(), WatchdogKind::None);
    }

    #[test]
    fn a_volume_whose_mode_needs_no_watchdog_is_never_enlisted() {
        let lease_only = Enlistment::new(Rules::ENFORCED, false);
        let (lease_only, call) = refreshed(lease_only, &WRITES, HARDWARE);
        assert_eq!(call, WatchdogCall::Withdraw);
        assert!(lease_only.may_open(true) && !lease_only.is_withdrawn());
        assert_eq!(lease_only.kind(), WatchdogKind::None);
    }
}
