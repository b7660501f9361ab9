//! The live destination: carries out what [`bascule_migrate::destination`] decides.
//!
//! The machine is complete before a source is admitted. Until memory is received, a source that does not
//! fit is refused and the next connection is awaited; after that, a failure ends the attempt.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bascule_ipc::vm::{InterfaceConfig, MigrationPhase, VmConfig};
use bascule_migrate::Frame;
use bascule_migrate::destination::{
    CommitEvent, CommitStep, ExpectCommit, ExpectHello, ExpectMemory, ExpectState, Expected,
    Interface, Machine, MemoryStep, Restoring, StateStep,
};
use bascule_migrate::wire::{Abort, AbortReason};
use bascule_types::{AttemptId, Epoch, Owner, Ownership, VmUid, VolumeId, error_chain};

use super::admission;
use super::apply::{Applier, layout_of};
use super::channel::{Channel, lost, lost_frame};
use super::control::{MigrationControl, millis};
use super::fault::{FaultPoint, Faults};
use super::guest::Arrival;
use super::ownership_client::{OwnershipAuthority, RecordAnswer};
use super::prefault::PrefaultedMemory;
use super::request::{Refused, describe};
use crate::state;

mod residency;

/// What a destination waits for.
#[derive(Clone, Debug)]
pub struct Incoming {
    /// The VM to receive.
    pub vm: VmUid,
    /// Chosen by the operator; the source must send the same id.
    pub attempt: AttemptId,
    /// This node, as it will own the VM.
    pub owner: Owner,
    /// Directory of the node's certificate, key and authority.
    pub tls_dir: PathBuf,
    /// Number of virtual CPUs.
    pub cpus: u16,
    /// Must be equal on both sides.
    pub description: Vec<u8>,
    /// The machine's network interfaces, in order.
    pub interfaces: Vec<Interface>,
    /// Longest time, after `Ready`, of querying the ownership record while a source without a stream
    /// still owns the VM. After it the machine is given up: see [`CommitEvent::TimedOut`].
    pub orphan_timeout: Duration,
    /// Faults injected by tests.
    pub faults: Faults,
}

/// The outcome of a live migration at the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum IncomingEnd {
    /// The guest runs here.
    Running {
        /// This node, as it owns the VM.
        owner: Owner,
        epoch: Epoch,
    },
    /// The guest did not arrive. The machine cannot be used again.
    Discarded {
        /// The cause.
        failure: Abort,
    },
    /// The guest arrived and could not be run: this node owns the VM and must start it from its disks.
    Broken {
        /// The step that failed.
        what: String,
    },
}

/// Longest wait for a frame from a connected source.
const PEER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for `Committed` after `Ready`, before the ownership record is queried. Long against a
/// commit, short against a guest's timeouts.
const COMMITTED_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval at which a destination without a stream queries the ownership record.
const QUERY_INTERVAL: Duration = Duration::from_millis(200);
/// The restore time that `Welcome` reports: 1 to 3 ms were measured with one vCPU.
const RESTORE_ESTIMATE: Duration = Duration::from_millis(3);
/// The default of [`Incoming::orphan_timeout`].
const ORPHAN_TIMEOUT: Duration = Duration::from_secs(600);

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
            interfaces: config.interfaces.iter().map(interface_of).collect(),
            orphan_timeout: ORPHAN_TIMEOUT,
            faults: Faults::from_environment(),
        })
    }
}

/// Waits for the source, takes the machine over and runs it.
pub fn receive_live(
    listener: &TcpListener,
    arrival: &mut dyn Arrival,
    memory: &PrefaultedMemory,
    job: &Incoming,
    authority: &mut dyn OwnershipAuthority,
    control: &MigrationControl,
) -> IncomingEnd {
    let receiver = Receiver {
        job,
        control,
        memory,
    };
    let arrived = receiver
        .admit(listener, authority.volume())
        .and_then(|(channel, phase)| receiver.receive_all(arrival, channel, phase));
    let (mut channel, waiting) = match arrived {
        Ok(arrived) => arrived,
        Err(failure) => return discard(control, failure),
    };
    match receiver.await_commit(&mut channel, waiting, authority) {
        Ok(epoch) => receiver.run(arrival, &mut channel, epoch, authority),
        Err(failure) => discard(control, failure),
    }
}

fn interface_of(interface: &InterfaceConfig) -> Interface {
    Interface {
        bridge: interface.bridge.clone(),
        mtu: interface.mtu,
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
    memory: &'a PrefaultedMemory,
}

/// The stream and the phase after `Ready`.
type Arrived = (Channel, ExpectCommit);

impl Receiver<'_> {
    /// Accepts connections until a source fits.
    fn admit(
        &self,
        listener: &TcpListener,
        volume: VolumeId,
    ) -> Result<(Channel, ExpectMemory), Abort> {
        let greet = |tcp, peer| self.answer(tcp, peer, volume);
        let admitted = admission::admit(listener, || self.control.is_cancelled(), greet);
        let (channel, phase) = admitted
            .map_err(|error| lost(&error))?
            .ok_or_else(cancelled)?;
        self.control.set_stream(channel.socket().ok());
        Ok((channel, phase))
    }

    /// None for a peer that is not the source; it is told why.
    fn answer(
        &self,
        tcp: TcpStream,
        peer: SocketAddr,
        volume: VolumeId,
    ) -> Option<(Channel, ExpectMemory)> {
        let mut channel = Channel::accept(tcp, &self.job.tls_dir)
            .inspect_err(
                |error| tracing::warn!(%peer, error = %error_chain(error), "source refused"),
            )
            .ok()?;
        match self.greet(&mut channel, volume) {
            Ok(phase) => Some((channel, phase)),
            Err(abort) => {
                tracing::warn!(%peer, reason = ?abort.reason, text = %abort.text, "source refused");
                channel.abort(&abort);
                None
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
            layout: layout_of(self.memory.memory()),
            description: self.job.description.clone(),
            interfaces: self.job.interfaces.clone(),
        };
        let frame = channel.receive().map_err(|error| lost_frame(&error))?;
        let phase = config.config(frame, &machine)?;
        if !phase.is_resident_first() {
            send(channel, &Frame::RoundAck { round: 0 })?;
        }
        channel
            .set_timeout(PEER_TIMEOUT)
            .map_err(|error| lost(&error))?;
        Ok(phase)
    }

    /// Memory, state, restore, `Ready`. A failure is sent to the source, which resumes.
    fn receive_all(
        &self,
        arrival: &mut dyn Arrival,
        mut channel: Channel,
        phase: ExpectMemory,
    ) -> Result<Arrived, Abort> {
        self.control.enter(MigrationPhase::PreCopy);
        let restored = self
            .begin_rounds(&mut channel, phase)
            .and_then(|phase| self.receive_memory(&mut channel, phase))
            .and_then(|phase| self.receive_state(&mut channel, phase))
            .and_then(|(phase, state)| self.restore(arrival, phase, &state))
            .and_then(|restored| {
                // From `Ready` on the source may commit: this side cannot be cancelled any more.
                let passed = self.control.pass_commit_point();
                passed.then_some(restored).ok_or_else(cancelled)
            });
        match restored {
            Ok((phase, restore)) => {
                self.control.enter(MigrationPhase::Committing);
                let waiting = phase.ready();
                let ready_sent = send(&mut channel, &Frame::Ready { restore });
                // Part of it may have arrived: from here on only the ownership record counts.
                if let Err(abort) =
                    ready_sent.and_then(|()| self.fault(FaultPoint::DestinationReady))
                {
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

    fn receive_memory(
        &self,
        channel: &mut Channel,
        mut phase: ExpectMemory,
    ) -> Result<ExpectState, Abort> {
        let memory = Arc::clone(self.memory.memory());
        let mut applier = Applier::new(&memory);
        loop {
            let mark = channel.received_mark();
            let frame = channel.receive().map_err(|error| lost_frame(&error))?;
            phase = match phase.frame(frame, mark)? {
                MemoryStep::Apply(phase, batch) => {
                    self.check_memory()?;
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
                    self.say_resident(channel, phase)?
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

    fn receive_state(
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

    /// Waits until it is known which node owns the VM.
    fn await_commit(
        &self,
        channel: &mut Channel,
        mut waiting: ExpectCommit,
        authority: &mut dyn OwnershipAuthority,
    ) -> Result<Epoch, Abort> {
        let deadline = Instant::now() + self.job.orphan_timeout;
        let mut event = next_commit_event(channel);
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
                    next_commit_event(channel)
                }
                CommitStep::QueryVolume(next) => {
                    let queried_before = waiting == next;
                    waiting = next;
                    if queried_before {
                        self.control.wait(QUERY_INTERVAL);
                    }
                    if Instant::now() >= deadline {
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
            tracing::error!(%reason, "the volume cannot be opened yet; the guest stays paused");
            // The node may have joined in a new generation, or another node may own the VM by now.
            if let RecordAnswer::Record(row) = authority.record() {
                match row.owner {
                    Some(now) if now.slot == owner.slot && row.epoch == epoch => owner = now,
                    _ => {
                        let what = "another owner took the VM before the guest ran".to_owned();
                        self.control.end(MigrationPhase::Failed, Some(what.clone()));
                        return IncomingEnd::Broken { what };
                    }
                }
            }
            std::thread::sleep(QUERY_INTERVAL);
        }
        arrival.announce();
        if let Err(error) = arrival.run() {
            self.control
                .end(MigrationPhase::Failed, Some(error.0.clone()));
            return IncomingEnd::Broken { what: error.0 };
        }
        let resume = began.elapsed();
        if let Err(abort) = send(channel, &Frame::Running { resume }) {
            tracing::info!(text = %abort.text, "the source did not receive that the guest runs");
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

/// The source's next frame after `Ready`.
fn next_commit_event(channel: &mut Channel) -> CommitEvent {
    if channel.set_timeout(COMMITTED_TIMEOUT).is_err() {
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
