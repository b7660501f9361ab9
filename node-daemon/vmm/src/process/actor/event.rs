//! What other threads send to the VM actor. Every variant names one thing that happened or is
//! requested; a request carries the channel for its reply.

use std::fmt;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use bascule_ipc::vm::{Request, Response, StopReason};
use bascule_types::Ownership;

use super::phase::BuiltMachine;
use crate::kvm::KvmError;
use crate::migration::{IncomingEnd, OutgoingEnd};
use crate::{BuildError, MachineState, PausedVm};

/// Most events that wait for the actor: connections are bounded and each has one request pending.
const INBOX_LENGTH: usize = 64;

/// What the actor applies next.
pub(crate) enum Event {
    /// There is something in the actor's [`super::notices::Notices`].
    Notices,
    /// A request on `vm.sock`.
    Control(Request, Reply<Answer>),
    /// End the process once the guest is stopped or departed. Sent after the reply to an accepted
    /// [`Request::Exit`], so that its client gets the reply.
    Exit(Reply<()>),
    /// The guest's agent has not shut the guest down: press the power button.
    PowerButton(Reply<()>),
    /// The host shuts down.
    HostShutdown(HostShutdown, Reply<()>),
    /// The outcome of a task thread.
    Task(TaskOutcome),
    /// A migration thread handles the machine.
    Migration(MigrationRequest),
    /// The thread that watches the gate requests a check of the ownership.
    Ownership(OwnershipRequest),
}

/// Why the guest is to be switched off for a shutdown of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostShutdown {
    /// SIGTERM or SIGINT has arrived.
    Requested,
    /// The VM's shutdown timeout has passed since the first of them.
    TimeIsUp,
}

/// The outcome of a task that the actor started.
pub(crate) enum TaskOutcome {
    /// Of building the machine. The ownership is set from the moment the volume was opened for
    /// writing, even when the build failed after that.
    Built(Option<Ownership>, anyhow::Result<BuiltMachine>),
    /// Of pausing the guest.
    Parked(Result<PausedVm, KvmError>),
    /// Of resetting the machine.
    Reset(Result<PausedVm, BuildError>),
    /// The wait of this number before a reset is over.
    ResetDue(u64),
    /// Of tearing the machine down, for this reason.
    Ended(StopReason),
}

/// What a migration thread requests.
pub(crate) enum MigrationRequest {
    /// Source: begin to pause the running guest.
    Pause(Reply<anyhow::Result<Done>>),
    /// Source: the encoded state of the paused machine.
    Save(Reply<anyhow::Result<Vec<u8>>>),
    /// Source: run the guest unless it runs, in this ownership if the attempt began a new one.
    ResumeSource(Option<Ownership>, Reply<anyhow::Result<()>>),
    /// Source: the commit request is about to be sent.
    MarkInDoubt(Reply<anyhow::Result<()>>),
    /// Source: the migration ended.
    OutgoingEnded(OutgoingEnd, Reply<()>),
    /// Destination: listens for the source here.
    Listening(Option<SocketAddr>, Reply<()>),
    /// Destination: put this state into the incoming machine.
    Restore(Box<MachineState>, Reply<anyhow::Result<()>>),
    /// Destination: the volume is open for writing under this ownership.
    TakeOver(Ownership, Reply<anyhow::Result<()>>),
    /// Destination: announce the guest's addresses to the network.
    Announce(Reply<anyhow::Result<()>>),
    /// Destination: run the incoming guest.
    RunArrived(Reply<anyhow::Result<()>>),
    /// Destination: the migration ended.
    IncomingEnded(IncomingEnd, Reply<()>),
    /// Either side: the migration thread could not do its work, for this reason.
    Failed(String, Reply<()>),
}

/// What the thread that watches the gate requests.
pub(crate) enum OwnershipRequest {
    /// The ownership in which this process writes; none when it does not.
    Get(Reply<Option<Ownership>>),
    /// Write under this ownership from now on, if the process still owns the VM in the same epoch.
    /// Replies whether it does.
    Adopt(Ownership, Reply<bool>),
    /// The ownership is lost, for this reason. Replies whether this process still believed to have
    /// it: it must then exit at once.
    Lost(String, Reply<bool>),
}

/// The reply to a request on `vm.sock`.
pub(crate) enum Answer {
    /// A response, with file descriptors to pass.
    Now(Response, Vec<OwnedFd>),
    /// [`Response::Accepted`] or a refusal, once the requested change is done.
    When(Done),
}

/// Receives the outcome of a change that was begun: nothing, or why it failed.
pub(crate) type Done = Receiver<Result<(), String>>;

/// Where the actor puts the reply to one request.
pub(crate) struct Reply<T>(SyncSender<T>);

/// Sends events to the actor, from any thread.
#[derive(Clone, Debug)]
pub(crate) struct ActorHandle {
    inbox_tx: SyncSender<Event>,
}

/// The actor has ended, and with it the process.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the process is ending")]
pub(crate) struct ActorGone;

impl ActorHandle {
    /// A handle, and the inbox that it fills.
    pub(super) fn channel() -> (Self, Receiver<Event>) {
        let (inbox_tx, inbox_rx) = sync_channel(INBOX_LENGTH);
        (Self { inbox_tx }, inbox_rx)
    }

    /// Sends a request and waits for its reply.
    pub(crate) fn request<T>(&self, event: impl FnOnce(Reply<T>) -> Event) -> Result<T, ActorGone> {
        let (reply_tx, reply_rx) = sync_channel(1);
        self.inbox_tx
            .send(event(Reply(reply_tx)))
            .map_err(|_| ActorGone)?;
        reply_rx.recv().map_err(|_| ActorGone)
    }

    /// [`Self::request`] for a migration thread.
    pub(super) fn migration<T>(
        &self,
        request: impl FnOnce(Reply<T>) -> MigrationRequest,
    ) -> Result<T, ActorGone> {
        self.request(|reply| Event::Migration(request(reply)))
    }

    /// Sends the outcome of a task.
    pub(super) fn task_ended(&self, outcome: TaskOutcome) {
        if self.inbox_tx.send(Event::Task(outcome)).is_err() {
            tracing::debug!("the outcome of a task is dropped: the process is ending");
        }
    }

    /// Makes the actor process its notices. Never blocks: with a full inbox the actor processes
    /// them after the next event anyway.
    pub(super) fn notify(&self) {
        if let Err(TrySendError::Disconnected(_)) = self.inbox_tx.try_send(Event::Notices) {
            tracing::debug!("a notice is dropped: the process is ending");
        }
    }
}

impl<T> Reply<T> {
    /// Sends the reply.
    pub(super) fn send(&self, value: T) {
        if self.0.send(value).is_err() {
            tracing::debug!("the requester does not wait for the reply any more");
        }
    }
}

impl fmt::Debug for Event {
    /// The event's name, and for requests on `vm.sock` all of the request.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Notices => f.write_str("Notices"),
            Self::Control(request, _) => write!(f, "Control({request:?})"),
            Self::Exit(_) => f.write_str("Exit"),
            Self::PowerButton(_) => f.write_str("PowerButton"),
            Self::HostShutdown(why, _) => write!(f, "HostShutdown({why:?})"),
            Self::Task(outcome) => write!(f, "Task({})", outcome.name()),
            Self::Migration(request) => write!(f, "Migration({})", request.name()),
            Self::Ownership(request) => write!(f, "Ownership({})", request.name()),
        }
    }
}

impl TaskOutcome {
    const fn name(&self) -> &'static str {
        match self {
            Self::Built(..) => "Built",
            Self::Parked(_) => "Parked",
            Self::Reset(_) => "Reset",
            Self::ResetDue(_) => "ResetDue",
            Self::Ended(_) => "Ended",
        }
    }
}

impl MigrationRequest {
    const fn name(&self) -> &'static str {
        match self {
            Self::Pause(_) => "Pause",
            Self::Save(_) => "Save",
            Self::ResumeSource(..) => "ResumeSource",
            Self::MarkInDoubt(_) => "MarkInDoubt",
            Self::OutgoingEnded(..) => "OutgoingEnded",
            Self::Listening(..) => "Listening",
            Self::Restore(..) => "Restore",
            Self::TakeOver(..) => "TakeOver",
            Self::Announce(_) => "Announce",
            Self::RunArrived(_) => "RunArrived",
            Self::IncomingEnded(..) => "IncomingEnded",
            Self::Failed(..) => "Failed",
        }
    }
}

impl OwnershipRequest {
    const fn name(&self) -> &'static str {
        match self {
            Self::Get(_) => "Get",
            Self::Adopt(..) => "Adopt",
            Self::Lost(..) => "Lost",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_logged_event_names_the_request_and_its_fields() {
        let (actor, inbox) = ActorHandle::channel();
        actor.notify();
        actor.task_ended(TaskOutcome::Ended(StopReason::Requested));
        let requester = std::thread::Builder::new()
            .spawn(move || actor.request(|reply| Event::Control(Request::Pause, reply)))
            .unwrap();
        let logged: Vec<_> = inbox
            .iter()
            .take(3)
            .map(|event| format!("{event:?}"))
            .collect();
        assert_eq!(logged, ["Notices", "Task(Ended)", "Control(Pause)"]);
        assert!(requester.join().unwrap().is_err(), "the reply was dropped");
    }
}
