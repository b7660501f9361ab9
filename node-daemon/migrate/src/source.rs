//! The source's state machine. It decides the order of steps and on which side the guest may run;
//! `precopy` decides how many rounds to copy and when to stop the guest.
//!
//! # States
//! ```text
//!  Greeting ─Welcome─► Describing ─RoundAck 0─► Copying ─stop─► Stopping ─stopped─► Sending
//!     │                    │                     │ ▲ │ ▲ next      │                  │ all sent
//!     │                    │          RoundAck 1 │ │ └─┘ round     │                  ▼
//!     │                    │                     ▼ │ Resident      │                  │
//!     │                    │                AwaitingMemory         │                  │
//!     ├────────────────────┴───── any failure ────┴────────────────┴──────────── AwaitingReady
//!     ▼                                                                               │ Ready
//!  Returned ◄───────────── retracted: resume in a new epoch ────────────────── Committing ◄┐
//!                                                                  transferred │  │   │    │ no answer,
//!                                                                              ▼  │   └────┘ refused
//!                                                                       Departed  └─► Lost (another owner)
//! ```
//!
//! | state | side | the guest here |
//! |---|---|---|
//! | Greeting, Describing, Copying, AwaitingMemory | source | runs |
//! | Stopping, Sending, AwaitingReady | source | is stopped, and resumed at once on any failure |
//! | Committing | unknown | stays stopped until the volume has answered |
//! | Returned | source | runs |
//! | Departed, Lost | destination, or the owner in the ownership record | never runs again |
//!
//! AwaitingMemory is passed only with a destination that uses [`Features::RESIDENT`]: it may lack the memory for the
//! guest until it has sent `Resident`.

use std::time::Duration;

use bascule_types::{AttemptId, Epoch, Owner, VmUid, VolumeId};

use crate::commit::{Commit, Reply, Terms, TransferRequest};
use crate::wire::{
    Abort, AbortReason, Committed, Features, Frame, Hello, VERSION_MAX, VERSION_MIN, Welcome,
};

#[cfg(test)]
mod tests;

/// One attempt of a live migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Attempt {
    /// The VM to migrate.
    pub vm: VmUid,
    /// Chosen by the operator; the destination waits for the same id.
    pub attempt: AttemptId,
    /// A fresh id, under which the source takes the ownership back if the transfer is refused.
    pub retraction: AttemptId,
    /// The source, as it owns the VM.
    pub source: Owner,
    /// The epoch in which it does.
    pub epoch: Epoch,
    /// The VM's home volume.
    pub volume: VolumeId,
    /// The node that is to own the VM.
    pub destination: Owner,
}

/// The source's state machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    attempt: Attempt,
    state: State,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    Greeting,
    Describing(Terms, Residency),
    Copying(Terms, u32, Residency),
    AwaitingMemory(Terms, u32),
    Stopping(Terms, u32),
    Sending(Terms, u32),
    AwaitingReady(Terms, u32),
    Committing(Terms, Commit),
    Departed(Committed),
    Returned,
    Lost,
}

/// Whether all of the destination's memory is resident, so that it cannot run out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Residency {
    /// From the start, or the destination has said so.
    Complete,
    /// The destination will say when it is.
    Announced,
}

/// The state without its data, for logs and the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the module's table describes them")]
pub enum Phase {
    Greeting,
    Describing,
    Copying,
    AwaitingMemory,
    Stopping,
    Sending,
    AwaitingReady,
    Committing,
    Departed,
    Returned,
    Lost,
}

/// On which side the guest may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// On the source only.
    Source,
    /// The ownership record says which; the source stays stopped until the volume has answered.
    Unknown,
    /// Never again on the source.
    Elsewhere,
}

/// An input of the source's state machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The destination answered `Hello`.
    Welcomed(Welcome),
    /// The destination has applied this round; 0 means that it accepted `Config`.
    RoundAcked(u32),
    /// All of the destination's memory is resident.
    Resident,
    /// The pre-copy controller decided for another round.
    NextRound,
    /// The pre-copy controller decided to stop the guest.
    Stop,
    /// The vCPUs are stopped and the devices drained.
    Stopped,
    /// The last dirty pages and the state are on their way.
    AllSent,
    /// The destination has restored everything.
    Ready,
    /// The volume replied to the request.
    Replied(Reply),
    /// Either side or the link failed, or the attempt was cancelled.
    Failed(Abort),
}

/// What to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Send `Config`, as the features that the destination has taken want it.
    Describe(Features),
    /// Copy what is dirty, then send `RoundEnd` with this round.
    CopyRound(u32),
    /// Wait for `Resident`; the guest runs.
    AwaitMemory,
    /// Let the pre-copy controller decide: another round or stop.
    Decide(u32),
    /// Stop the vCPUs and drain the devices.
    StopGuest,
    /// Send the last round (with this number) and the device state.
    SendRemainder(u32),
    /// Wait for `Ready`.
    AwaitReady,
    /// Send this request to the volume, again until there is a reply.
    RequestTransfer(TransferRequest),
    /// Tell the destination that it may run, then end this process's guest.
    Depart(Committed),
    /// Put the dirty bits back and run the guest before any clean-up; then send the destination the
    /// reason, if it is reachable.
    KeepRunning(Abort),
    /// Run the stopped guest, in this ownership.
    Resume {
        /// The reason to send to the destination.
        cause: Abort,
        /// The source as the ownership record names it now.
        owner: Owner,
        /// The epoch, which may be a new one.
        epoch: Epoch,
    },
    /// End this process's guest: another node owns the VM.
    Terminate,
    /// Nothing: the event came too late or too early to matter.
    Nothing,
}

impl Source {
    /// A new attempt, and the `Hello` to send.
    #[must_use]
    pub const fn begin(attempt: Attempt) -> (Self, Hello) {
        let hello = Hello {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            streams: 1,
            offered: Features::KNOWN,
            required: Features(0),
            vm: attempt.vm,
            attempt: attempt.attempt,
            epoch: attempt.epoch,
            source: attempt.source,
            volume: attempt.volume,
        };
        let source = Self {
            attempt,
            state: State::Greeting,
        };
        (source, hello)
    }

    /// The state, for logs and the API.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        match self.state {
            State::Greeting => Phase::Greeting,
            State::Describing(..) => Phase::Describing,
            State::Copying(..) => Phase::Copying,
            State::AwaitingMemory(..) => Phase::AwaitingMemory,
            State::Stopping(..) => Phase::Stopping,
            State::Sending(..) => Phase::Sending,
            State::AwaitingReady(..) => Phase::AwaitingReady,
            State::Committing(..) => Phase::Committing,
            State::Departed(_) => Phase::Departed,
            State::Returned => Phase::Returned,
            State::Lost => Phase::Lost,
        }
    }

    /// On which side the guest may run.
    #[must_use]
    pub const fn side(&self) -> Side {
        self.phase().side()
    }

    /// Takes one event.
    #[must_use]
    pub fn next(self, event: Event) -> (Self, Action) {
        let attempt = self.attempt;
        let (state, action) = self.state.next(&attempt, event);
        (Self { attempt, state }, action)
    }
}

impl Phase {
    /// On which side the guest may run.
    #[must_use]
    pub const fn side(self) -> Side {
        match self {
            Self::Greeting
            | Self::Describing
            | Self::Copying
            | Self::AwaitingMemory
            | Self::Stopping
            | Self::Sending
            | Self::AwaitingReady
            | Self::Returned => Side::Source,
            Self::Committing => Side::Unknown,
            Self::Departed | Self::Lost => Side::Elsewhere,
        }
    }

    /// Whether the attempt can still be called off.
    #[must_use]
    pub const fn cancellable(self) -> bool {
        matches!(
            self,
            Self::Greeting
                | Self::Describing
                | Self::Copying
                | Self::AwaitingMemory
                | Self::Stopping
                | Self::Sending
                | Self::AwaitingReady
        )
    }
}

impl State {
    fn next(self, attempt: &Attempt, event: Event) -> (Self, Action) {
        match (self, event) {
            (Self::Committing(terms, commit), event) => Self::committing(terms, commit, &event),
            (done @ (Self::Departed(_) | Self::Returned | Self::Lost), _) => {
                (done, Action::Nothing)
            }
            (_, Event::Failed(abort)) => (Self::Returned, Action::KeepRunning(abort)),
            (Self::Greeting, Event::Welcomed(welcome)) => Self::greeted(attempt, &welcome),
            (Self::Describing(terms, residency), Event::RoundAcked(0)) => {
                (Self::Copying(terms, 1, residency), Action::CopyRound(1))
            }
            (Self::Copying(terms, round, residency), Event::RoundAcked(acked))
                if acked == round =>
            {
                match residency {
                    Residency::Complete => (
                        Self::Copying(terms, round, residency),
                        Action::Decide(round),
                    ),
                    Residency::Announced => {
                        (Self::AwaitingMemory(terms, round), Action::AwaitMemory)
                    }
                }
            }
            (Self::AwaitingMemory(terms, round), Event::Resident) => {
                let state = Self::Copying(terms, round, Residency::Complete);
                (state, Action::Decide(round))
            }
            (Self::Copying(terms, round, Residency::Complete), Event::NextRound) => {
                let round = round.saturating_add(1);
                let state = Self::Copying(terms, round, Residency::Complete);
                (state, Action::CopyRound(round))
            }
            (Self::Copying(terms, round, Residency::Complete), Event::Stop) => {
                (Self::Stopping(terms, round), Action::StopGuest)
            }
            (Self::Stopping(terms, round), Event::Stopped) => {
                let round = round.saturating_add(1);
                (Self::Sending(terms, round), Action::SendRemainder(round))
            }
            (Self::Sending(terms, round), Event::AllSent) => {
                (Self::AwaitingReady(terms, round), Action::AwaitReady)
            }
            (Self::AwaitingReady(terms, round), Event::RoundAcked(acked)) if acked == round => {
                (Self::AwaitingReady(terms, round), Action::AwaitReady)
            }
            (Self::AwaitingReady(terms, _), Event::Ready) => {
                // The commit point: from here on only the ownership record decides.
                Self::request_commit(terms, Commit::begin(terms, attempt.retraction))
            }
            (state, event) => {
                let text = format!("{event:?} in {state:?}");
                let abort = Abort::new(AbortReason::Protocol, text);
                (Self::Returned, Action::KeepRunning(abort))
            }
        }
    }

    fn greeted(attempt: &Attempt, welcome: &Welcome) -> (Self, Action) {
        let known = (VERSION_MIN..=VERSION_MAX).contains(&welcome.version)
            && Features::KNOWN.contains(welcome.features)
            && welcome.streams == 1;
        let refuse = |reason, text: &str| {
            let action = Action::KeepRunning(Abort::new(reason, text));
            (Self::Returned, action)
        };
        if !known {
            return refuse(
                AbortReason::Version,
                "the destination chose a version, feature or stream count that was not offered",
            );
        }
        if welcome.destination != attempt.destination || welcome.destination == attempt.source {
            return refuse(
                AbortReason::WrongAttempt,
                "another node than the requested destination answered",
            );
        }
        let terms = Terms {
            source: attempt.source,
            epoch: attempt.epoch,
            destination: welcome.destination,
            attempt: attempt.attempt,
        };
        let residency = if welcome.features.contains(Features::RESIDENT) {
            Residency::Announced
        } else {
            Residency::Complete
        };
        let state = Self::Describing(terms, residency);
        (state, Action::Describe(welcome.features))
    }

    fn committing(terms: Terms, commit: Commit, event: &Event) -> (Self, Action) {
        match event {
            Event::Replied(reply) => Self::request_commit(terms, commit.next(*reply)),
            // Failures of the link or the peer and cancelling have no effect after the commit point.
            _ => (Self::Committing(terms, commit), Action::Nothing),
        }
    }

    fn request_commit(terms: Terms, commit: Commit) -> (Self, Action) {
        match commit {
            Commit::Committed { epoch } => {
                let committed = Committed {
                    epoch,
                    owner: terms.destination,
                };
                (Self::Departed(committed), Action::Depart(committed))
            }
            Commit::Resumed { owner, epoch } => {
                let cause = Abort::new(AbortReason::CommitRefused, "the volume refused");
                (
                    Self::Returned,
                    Action::Resume {
                        cause,
                        owner,
                        epoch,
                    },
                )
            }
            Commit::Lost => (Self::Lost, Action::Terminate),
            Commit::Transferring(_) | Commit::Retracting(_) => {
                let request = commit.request();
                let action = request.map_or(Action::Nothing, Action::RequestTransfer);
                (Self::Committing(terms, commit), action)
            }
        }
    }
}

/// What a frame from the destination means to the source; none for one that needs no decision.
///
/// # Errors
/// The failure to hand to [`Source::next`]: the peer's own abort, or one for a frame that a
/// destination never sends.
pub fn event_of(frame: &Frame<'_>) -> Result<Option<Event>, Abort> {
    match frame {
        Frame::Welcome(welcome) => Ok(Some(Event::Welcomed(welcome.clone()))),
        Frame::RoundAck { round } => Ok(Some(Event::RoundAcked(*round))),
        Frame::Resident { .. } => Ok(Some(Event::Resident)),
        Frame::Ready { .. } => Ok(Some(Event::Ready)),
        Frame::Pong { .. } | Frame::Running { .. } => Ok(None),
        Frame::Abort(abort) => Err(abort.clone()),
        other => Err(Abort::new(
            AbortReason::Protocol,
            format!("a destination does not send {:?}", other.kind()),
        )),
    }
}

/// The pause before the next request to a volume that has not answered `attempts` requests: 1 ms at
/// first, because the guest is stopped, doubling up to 512 ms.
#[must_use]
pub fn retry_delay(attempts: u32) -> Duration {
    Duration::from_millis(1 << attempts.min(9))
}
