//! The live destination: acts on what [`bascule_migrate::destination`] decides.
//!
//! The machine is complete before the source is let in. Until the first memory has come, a source
//! that does not fit is turned away and the next one is waited for; after that, there is one try.

use std::io;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bascule_ipc::vm::{MigrationPhase, VmConfig};
use bascule_migrate::Frame;
use bascule_migrate::destination::{
    CommitEvent, CommitStep, ExpectCommit, ExpectHello, ExpectMemory, ExpectState, Expected,
    Machine, MemoryStep, Restoring, StateStep,
};
use bascule_migrate::wire::{Abort, AbortReason};
use bascule_types::{AttemptId, Epoch, Owner, Ownership, VmUid, VolumeId, error_chain};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::apply::{Applier, layout_of};
use super::channel::{Channel, lost, lost_frame};
use super::control::{MigrationControl, millis};
use super::fault::{FaultPoint, Faults};
use super::guest::Arrival;
use super::ownership_client::{OwnershipAuthority, RecordAnswer};
use super::request::{Refused, describe};
use crate::machine::MachineHandle;
use crate::memory::GuestMemory;
use crate::state;

/// What a destination waits for.
#[derive(Clone, Debug)]
pub struct Incoming {
    /// The VM.
    pub vm: VmUid,
    /// The attempt that may come in.
    pub attempt: AttemptId,
    /// Who will own the VM: this node.
    pub owner: Owner,
    /// The node's certificate.
    pub tls_dir: PathBuf,
    /// Virtual CPUs.
    pub cpus: u16,
    /// What must be equal on both sides.
    pub description: Vec<u8>,
    /// How long an unheard-of source is waited for once everything is here, while the row is still
    /// its own. After that the machine is given up: see [`CommitEvent::TimedOut`].
    pub patience: Duration,
    /// What a test breaks.
    pub faults: Faults,
}

/// What became of an incoming migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IncomingEnd {
    /// The guest runs here.
    Running {
        /// Its tenure.
        owner: Owner,
        /// Its epoch.
        epoch: Epoch,
    },
    /// It did not come, and will not. The machine is of no more use.
    Discarded {
        /// Why.
        failure: Abort,
    },
    /// It came, and could not be run: it is this node's, and must be started from its disks.
    Broken {
        /// What failed.
        what: String,
    },
}

/// How long a connected source may be silent.
const PEER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long after `Ready` the source's word is waited for, before the row is asked. Long against a
/// commit, short against a guest's patience.
const WORD_TIMEOUT: Duration = Duration::from_secs(2);
/// How often an orphaned destination asks for the row.
const ASK_EVERY: Duration = Duration::from_millis(200);
/// How often a waiting listener looks whether it was cancelled.
const LOOK_EVERY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000_000,
};
/// What restoring is said to take: 1 to 3 ms were measured with one vCPU.
const RESTORE_ESTIMATE: Duration = Duration::from_millis(3);
/// How much memory is made resident at once.
const PREFAULT_BYTES: usize = 64 << 20;
/// The default of [`Incoming::patience`].
const PATIENCE: Duration = Duration::from_secs(600);

impl Incoming {
    /// What `config`'s machine waits for.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn new(config: &VmConfig, attempt: AttemptId) -> Result<Self, Refused> {
        let home = config.home.as_ref().ok_or(Refused::NoHome)?;
        Ok(Self {
            vm: config.uid,
            attempt,
            owner: home.owner,
            tls_dir: config.tls_dir.clone().ok_or(Refused::NoTls)?,
            cpus: config.cpus.into(),
            description: describe(config).map_err(Refused::Description)?,
            patience: PATIENCE,
            faults: Faults::from_environment(),
        })
    }
}

/// Makes all of the machine's memory resident, so that a destination without enough of it fails
/// before the source has begun.
///
/// # Errors
/// When the kernel has not got the memory.
pub fn prefault(machine: &MachineHandle) -> io::Result<()> {
    populate(machine.memory())
}

#[expect(unsafe_code, reason = "the kernel is handed guest memory's addresses")]
fn populate(memory: &GuestMemory) -> io::Result<()> {
    use rustix::mm::{Advice, madvise};
    for region in memory.iter() {
        let length = usize::try_from(region.len()).unwrap_or(0);
        for start in (0..length).step_by(PREFAULT_BYTES) {
            let step = PREFAULT_BYTES.min(length - start);
            let address = region.as_ptr().wrapping_add(start).cast();
            // SAFETY: the range lies within one mapping of guest memory, which `memory` keeps
            // alive; populating it changes no byte and no protection.
            let populated = unsafe { madvise(address, step, Advice::LinuxPopulateWrite) };
            match populated {
                // Kernels before 5.14 do it page by page, when the pages are written.
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(())
}

/// Waits for the source, takes the machine over and runs it.
pub fn receive_live(
    listener: &TcpListener,
    arrival: &mut dyn Arrival,
    machine: &MachineHandle,
    job: &Incoming,
    authority: &mut dyn OwnershipAuthority,
    control: &MigrationControl,
) -> IncomingEnd {
    let receiver = Receiver {
        job,
        control,
        memory: Arc::clone(machine.memory()),
    };
    let arrived = receiver
        .admit(listener, authority.volume())
        .and_then(|(channel, phase)| receiver.take_all(arrival, channel, phase));
    let (mut channel, waiting) = match arrived {
        Ok(arrived) => arrived,
        Err(failure) => return discard(control, failure),
    };
    match receiver.await_commit(&mut channel, waiting, authority) {
        Ok(epoch) => receiver.run(arrival, &mut channel, epoch, authority),
        Err(failure) => discard(control, failure),
    }
}

fn discard(control: &MigrationControl, failure: Abort) -> IncomingEnd {
    let phase = match failure.reason {
        AbortReason::Cancelled => MigrationPhase::Cancelled,
        _ if control.is_cancelled() => MigrationPhase::Cancelled,
        _ => MigrationPhase::Failed,
    };
    control.end(phase, Some(failure.text.clone()));
    IncomingEnd::Discarded { failure }
}

struct Receiver<'a> {
    job: &'a Incoming,
    control: &'a MigrationControl,
    memory: Arc<GuestMemory>,
}

/// What came in whole.
type Arrived = (Channel, ExpectCommit);

impl Receiver<'_> {
    /// The first source that fits.
    fn admit(
        &self,
        listener: &TcpListener,
        volume: VolumeId,
    ) -> Result<(Channel, ExpectMemory), Abort> {
        listener
            .set_nonblocking(true)
            .map_err(|error| lost(&error))?;
        loop {
            let mut ready = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
            if let Err(errno) = poll(&mut ready, Some(&LOOK_EVERY))
                && errno != rustix::io::Errno::INTR
            {
                return Err(lost(&errno.into()));
            }
            if self.control.is_cancelled() {
                return Err(cancelled());
            }
            let (tcp, peer) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        tracing::warn!(%error, "a connection was lost before it was taken");
                    }
                    continue;
                }
            };
            if let Err(error) = tcp.set_nonblocking(false) {
                tracing::warn!(%error, %peer, "a connection is of no use");
                continue;
            }
            match Channel::accept(tcp, &self.job.tls_dir) {
                Ok(mut channel) => match self.greet(&mut channel, volume) {
                    Ok(phase) => {
                        self.control.set_stream(channel.socket().ok());
                        return Ok((channel, phase));
                    }
                    Err(abort) => {
                        tracing::warn!(%peer, reason = ?abort.reason, text = %abort.text, "turned away");
                        channel.abort(&abort);
                    }
                },
                Err(error) => tracing::warn!(%peer, error = %error_chain(&error), "turned away"),
            }
        }
    }

    fn greet(&self, channel: &mut Channel, volume: VolumeId) -> Result<ExpectMemory, Abort> {
        let hello = ExpectHello::new(Expected {
            vm: self.job.vm,
            attempt: self.job.attempt,
            volume,
            destination: self.job.owner,
            restore_estimate: RESTORE_ESTIMATE,
        });
        let frame = channel.receive().map_err(|error| lost_frame(&error))?;
        let (config, welcome) = hello.hello(frame)?;
        self.fault(FaultPoint::DestinationHello)?;
        send(channel, &Frame::Welcome(welcome))?;
        let machine = Machine {
            vcpus: self.job.cpus,
            state_versions: (state::VERSION, state::VERSION),
            layout: layout_of(&self.memory),
            description: self.job.description.clone(),
        };
        let frame = channel.receive().map_err(|error| lost_frame(&error))?;
        let phase = config.config(frame, &machine)?;
        send(channel, &Frame::RoundAck { round: 0 })?;
        channel
            .set_timeout(PEER_TIMEOUT)
            .map_err(|error| lost(&error))?;
        Ok(phase)
    }

    /// Memory, state, restore, `Ready`. A failure is told to the source, which resumes.
    fn take_all(
        &self,
        arrival: &mut dyn Arrival,
        mut channel: Channel,
        phase: ExpectMemory,
    ) -> Result<Arrived, Abort> {
        self.control.enter(MigrationPhase::PreCopy);
        let restored = self
            .take_memory(&mut channel, phase)
            .and_then(|phase| self.take_state(&mut channel, phase))
            .and_then(|(phase, state)| self.restore(arrival, phase, &state))
            .and_then(|restored| {
                // From `Ready` on the source may commit: nobody calls this side off any more.
                let passed = self.control.pass_commit_point();
                passed.then_some(restored).ok_or_else(cancelled)
            });
        match restored {
            Ok((phase, restore)) => {
                self.control.enter(MigrationPhase::Committing);
                let waiting = phase.ready();
                let told = send(&mut channel, &Frame::Ready { restore });
                // Half of it may have arrived: from here on only the row counts.
                if let Err(abort) = told.and_then(|()| self.fault(FaultPoint::DestinationReady)) {
                    tracing::warn!(text = %abort.text, "the stream broke at Ready");
                    channel.close();
                }
                Ok((channel, waiting))
            }
            Err(abort) => {
                channel.abort(&abort);
                Err(abort)
            }
        }
    }

    fn take_memory(
        &self,
        channel: &mut Channel,
        mut phase: ExpectMemory,
    ) -> Result<ExpectState, Abort> {
        let memory = Arc::clone(&self.memory);
        let mut applier = Applier::new(&memory);
        loop {
            let mark = channel.received_mark();
            let frame = channel.receive().map_err(|error| lost_frame(&error))?;
            phase = match phase.frame(frame, mark)? {
                MemoryStep::Apply(phase, batch) => {
                    applier
                        .apply(&batch)
                        .map_err(|error| failed(AbortReason::Internal, &error))?;
                    self.fault(FaultPoint::DestinationMemory)?;
                    let bytes = phase.received().pages_to_bytes();
                    self.control.update(|status| status.bytes = bytes);
                    phase
                }
                MemoryStep::RoundEnded(phase, round) => {
                    self.fault(FaultPoint::DestinationRound)?;
                    self.control.update(|status| status.rounds = round);
                    send(channel, &Frame::RoundAck { round })?;
                    phase
                }
                MemoryStep::Ping(phase, token) => {
                    send(channel, &Frame::Pong { token })?;
                    phase
                }
                MemoryStep::Progress(phase, progress) => {
                    self.control
                        .update(|status| status.remaining = progress.remaining);
                    phase
                }
                MemoryStep::State(phase) => {
                    self.control.enter(MigrationPhase::Stopping);
                    return Ok(phase);
                }
            };
        }
    }

    fn take_state(
        &self,
        channel: &mut Channel,
        mut phase: ExpectState,
    ) -> Result<(Restoring, Vec<u8>), Abort> {
        loop {
            let frame = channel.receive().map_err(|error| lost_frame(&error))?;
            match phase.frame(&frame)? {
                StateStep::More(next) => phase = next,
                StateStep::Complete(restoring, state) => {
                    self.fault(FaultPoint::DestinationState)?;
                    return Ok((restoring, state));
                }
            }
        }
    }

    fn restore(
        &self,
        arrival: &mut dyn Arrival,
        phase: Restoring,
        state: &[u8],
    ) -> Result<(Restoring, Duration), Abort> {
        let began = Instant::now();
        arrival
            .restore(state)
            .map_err(|error| failed(AbortReason::Restore, &error))?;
        let took = began.elapsed();
        tracing::debug!(?took, "restored");
        self.fault(FaultPoint::DestinationRestored)?;
        Ok((phase, took))
    }

    /// Until it is known whose the machine is.
    fn await_commit(
        &self,
        channel: &mut Channel,
        mut waiting: ExpectCommit,
        authority: &mut dyn OwnershipAuthority,
    ) -> Result<Epoch, Abort> {
        let given_up = Instant::now() + self.job.patience;
        let mut event = word(channel);
        loop {
            let step = waiting.next(&event);
            tracing::debug!(?event, ?step, "after Ready");
            event = match step {
                CommitStep::Run { epoch } => return Ok(epoch),
                CommitStep::Discard => {
                    return Err(Abort::new(
                        AbortReason::CommitRefused,
                        format!("the VM stays where it is: {event:?}"),
                    ));
                }
                CommitStep::Wait(next) => {
                    waiting = next;
                    word(channel)
                }
                CommitStep::QueryVolume(next) => {
                    let asked_before = waiting == next;
                    waiting = next;
                    if asked_before {
                        self.control.wait(ASK_EVERY);
                    }
                    if Instant::now() >= given_up {
                        CommitEvent::TimedOut
                    } else {
                        match authority.record() {
                            RecordAnswer::Record(row) => CommitEvent::Record(row),
                            RecordAnswer::NoRecord => CommitEvent::NoRecord,
                            RecordAnswer::NoAnswer => CommitEvent::NoAnswer,
                        }
                    }
                }
            };
        }
    }

    fn run(
        &self,
        arrival: &mut dyn Arrival,
        channel: &mut Channel,
        epoch: Epoch,
        authority: &mut dyn OwnershipAuthority,
    ) -> IncomingEnd {
        let began = Instant::now();
        let mut owner = self.job.owner;
        while let Err(reason) = arrival.take_over(Ownership::new(owner, epoch)) {
            tracing::error!(%reason, "the volume cannot be opened yet; the guest waits");
            // The node's slot may have been joined again, or the row may be gone by now.
            if let RecordAnswer::Record(row) = authority.record() {
                match row.owner {
                    Some(now) if now.slot == owner.slot && row.epoch == epoch => owner = now,
                    _ => {
                        let what = "the row went on before the guest ran".to_owned();
                        self.control.end(MigrationPhase::Failed, Some(what.clone()));
                        return IncomingEnd::Broken { what };
                    }
                }
            }
            std::thread::sleep(ASK_EVERY);
        }
        arrival.announce();
        if let Err(error) = arrival.run() {
            self.control
                .end(MigrationPhase::Failed, Some(error.0.clone()));
            return IncomingEnd::Broken { what: error.0 };
        }
        let resume = began.elapsed();
        if let Err(abort) = send(channel, &Frame::Running { resume }) {
            tracing::info!(text = %abort.text, "the source was not told that the guest runs");
        }
        self.control
            .update(|status| status.downtime_ms = Some(millis(resume)));
        self.control.end(MigrationPhase::Completed, None);
        arrival.announce();
        IncomingEnd::Running { owner, epoch }
    }

    fn fault(&self, point: FaultPoint) -> Result<(), Abort> {
        self.job.faults.pass(point).map_err(|error| lost(&error))
    }
}

/// What the source says after `Ready`.
fn word(channel: &mut Channel) -> CommitEvent {
    if channel.set_timeout(WORD_TIMEOUT).is_err() {
        return CommitEvent::StreamLost;
    }
    match channel.receive() {
        Ok(Frame::Committed(committed)) => CommitEvent::Committed(committed),
        Ok(Frame::Abort(_)) => CommitEvent::Aborted,
        Ok(_) | Err(_) => CommitEvent::StreamLost,
    }
}

fn send(channel: &mut Channel, frame: &Frame<'_>) -> Result<(), Abort> {
    channel.send(frame).map(drop).map_err(|error| lost(&error))
}

fn failed(reason: AbortReason, error: &dyn std::error::Error) -> Abort {
    Abort::new(reason, error_chain(error))
}

fn cancelled() -> Abort {
    Abort::new(AbortReason::Cancelled, "the migration was cancelled")
}
