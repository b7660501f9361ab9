//! The destination's state machine: one type per awaited frame.
//!
//! # States
//! ```text
//!  ExpectHello ─Hello─► ExpectConfig ─Config─► ExpectMemory ─State─► ExpectState ─StateEnd─► Restoring
//!     │                    │                    │ ▲ Memory,           │ ▲ State                │ restored:
//!     │                    │                    │ └─┘ RoundEnd, ...   │ └─┘                    │ Ready
//!     └────────────────────┴── refused or lost ─┴─────────────────────┴────────────► give up   ▼
//!                                                                                     ExpectCommit
//!  ExpectCommit, link up ───── Committed ────────────────────────────► run
//!     │      └──────────────── Abort ────────────────────────────────► discard
//!     │ stream lost, impossible Committed
//!     ▼
//!  ExpectCommit, link down ─── record names this node ───────────────► run
//!     │ ▲    └──────────────── other owner, no record, timed out ────► discard
//!     └─┘ no answer, or the source still owns the VM: query again
//! ```
//!
//! The memory becomes resident while the first round arrives. [`ExpectMemory`] takes no state before it is, so that a
//! destination that lacks memory gives up while the guest runs on the source.
//!
//! Before [`ExpectCommit`] every failure ends in giving up: the guest runs on the source. In
//! [`ExpectCommit`] the source may already have requested the transfer, so a lost stream proves nothing
//! and the destination reads the ownership record from its own volume.
//!
//! The peer is another node of the cluster, authenticated by its certificate, but its bytes are not
//! trusted: every method takes a frame by value, refuses what the phase does not allow, and returns the
//! next phase only for a valid frame.

use std::time::Duration;

use bascule_types::{AttemptId, Bytes, Epoch, Owner, VmUid, VolumeId};

use crate::commit::{OwnershipRecord, Terms};
use crate::pages::{MemoryLayout, Pages};
use crate::wire::{
    Abort, AbortReason, Batch, Committed, Config, Features, Frame, Hello, RoundEnd,
    STATE_BYTES_MAX, StateEnd, StreamMark, VERSION_MAX, VERSION_MIN, Welcome,
};

#[cfg(test)]
mod tests;

/// The attempt that the destination waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// The VM to receive.
    pub vm: VmUid,
    /// Chosen by the operator; the source sends the same id.
    pub attempt: AttemptId,
    /// The VM's home volume.
    pub volume: VolumeId,
    /// This node, as it will own the VM.
    pub destination: Owner,
    /// How long restoring the state is estimated to take.
    pub restore_estimate: Duration,
}

/// The machine that was built on the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Number of virtual CPUs.
    pub vcpus: u16,
    /// The lowest and highest version of the device state that it can restore.
    pub state_versions: (u32, u32),
    /// Its RAM, in pages.
    pub layout: MemoryLayout,
    /// Compared byte for byte with the source's.
    pub description: Vec<u8>,
    /// Its network interfaces, in order.
    pub interfaces: Vec<Interface>,
}

/// A network interface of the machine that was built on the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// The bridge of this node that it is attached to; empty when it is not known.
    pub bridge: String,
    /// MTU in bytes of the bridge; none when it is not known.
    pub mtu: Option<u16>,
}

/// Waits for `Hello`.
#[derive(Debug)]
pub struct ExpectHello {
    expected: Expected,
}

/// Waits for `Config`.
#[derive(Debug)]
pub struct ExpectConfig {
    terms: Terms,
    features: Features,
}

/// Takes memory, round after round.
#[derive(Debug)]
pub struct ExpectMemory {
    terms: Terms,
    layout: MemoryLayout,
    rounds: u32,
    in_round: bool,
    received: Pages,
    residency: Residency,
}

/// Whether the machine's memory is resident.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Residency {
    /// Not yet. A source that does not know [`Features::RESIDENT`] waits for `RoundAck` 0 meanwhile.
    Pending {
        source_copies: bool,
    },
    Complete,
}

/// Takes the device state.
#[derive(Debug)]
pub struct ExpectState {
    terms: Terms,
    state: Vec<u8>,
}

/// Has received everything; the machine is being restored.
#[derive(Debug)]
pub struct Restoring {
    terms: Terms,
}

/// Has sent `Ready`: the source may pass the commit point at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExpectCommit {
    terms: Terms,
    link: Link,
}

/// Whether the stream from the source still works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Link {
    Up,
    Down,
}

/// What a frame in [`ExpectMemory`] means.
#[derive(Debug)]
pub enum MemoryStep<'a> {
    /// Write these runs, all of which are memory of this machine.
    Apply(ExpectMemory, Batch<'a>),
    /// Answer `RoundAck` with this round.
    RoundEnded(ExpectMemory, u32),
    /// The source is stopped and the first piece of its state has been taken.
    State(ExpectState),
    /// Answer `Pong`.
    Ping(ExpectMemory, u64),
    /// Show this progress in the status.
    Progress(ExpectMemory, crate::wire::Progress),
}

/// What a frame in [`ExpectState`] means.
#[derive(Debug)]
pub enum StateStep {
    /// More is to come.
    More(ExpectState),
    /// The state is complete and its checksum is right.
    Complete(Restoring, Vec<u8>),
}

/// What happens while waiting for the commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommitEvent {
    /// The source reports that the ownership was transferred.
    Committed(Committed),
    /// The source gives up: it has not requested the transfer, or has taken the ownership back.
    Aborted,
    /// The stream ended or carried an unexpected frame.
    StreamLost,
    /// The ownership record, as the coordinator read it.
    Record(OwnershipRecord),
    /// The volume has no ownership record of this VM.
    NoRecord,
    /// The volume did not answer.
    NoAnswer,
    /// The volume has been queried for as long as the node's policy allows.
    TimedOut,
}

/// What to do then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum CommitStep {
    /// Wait for the source's `Committed`.
    Wait(ExpectCommit),
    /// Query the volume for the ownership record, after a pause if it was queried before.
    QueryVolume(ExpectCommit),
    /// This node owns the VM: announce and run.
    Run { epoch: Epoch },
    /// This attempt will not make this node the owner: give up.
    Discard,
}

impl ExpectHello {
    /// Waits for the attempt that was agreed on.
    #[must_use]
    pub const fn new(expected: Expected) -> Self {
        Self { expected }
    }

    /// Takes the first frame; the `Welcome` is to be sent.
    ///
    /// # Errors
    /// The `Abort` to send before giving up.
    pub fn hello(self, frame: Frame<'_>) -> Result<(ExpectConfig, Welcome), Abort> {
        let Frame::Hello(hello) = frame else {
            return Err(unexpected(&frame, "Hello"));
        };
        let expected = self.expected;
        let version = common_version(&hello)?;
        let wrong = |what: &str| Err(Abort::new(AbortReason::WrongAttempt, what));
        if hello.vm != expected.vm {
            return wrong(&format!(
                "waiting for {:?}, not {:?}",
                expected.vm, hello.vm
            ));
        }
        if hello.attempt != expected.attempt {
            return wrong("waiting for another attempt");
        }
        if hello.volume != expected.volume {
            return wrong("the VM's home is another volume here");
        }
        if hello.source == expected.destination {
            return wrong("source and destination are one node");
        }
        let terms = Terms {
            source: hello.source,
            epoch: hello.epoch,
            destination: expected.destination,
            attempt: hello.attempt,
        };
        let welcome = Welcome {
            version,
            streams: hello.streams.clamp(1, STREAMS),
            features: hello.offered.and(Features::KNOWN),
            destination: expected.destination,
            restore_estimate: expected.restore_estimate,
        };
        let features = welcome.features;
        Ok((ExpectConfig { terms, features }, welcome))
    }
}

impl ExpectConfig {
    /// Takes the first frame of a saved image (quick migration): there is no source to answer, and
    /// what comes out of it is restored, not committed. `epoch` is the epoch in which it must have
    /// been saved.
    ///
    /// # Errors
    /// An `Abort` that says why this is not the image.
    pub fn of_image(
        frame: Frame<'_>,
        (vm, volume, epoch): (VmUid, VolumeId, Epoch),
    ) -> Result<Self, Abort> {
        let Frame::Hello(hello) = frame else {
            return Err(unexpected(&frame, "Hello"));
        };
        common_version(&hello)?;
        if hello.vm != vm || hello.volume != volume || hello.epoch != epoch {
            return Err(Abort::new(
                AbortReason::WrongAttempt,
                "the image is of another VM, volume or epoch",
            ));
        }
        let terms = Terms {
            source: hello.source,
            epoch: hello.epoch,
            destination: hello.source,
            attempt: hello.attempt,
        };
        let features = Features(0);
        Ok(Self { terms, features })
    }

    /// Takes the description of the source's machine and compares it with the one built here.
    /// `RoundAck` with round 0 is to be sent; if [`ExpectMemory::is_resident_first`], not before the memory is resident.
    ///
    /// # Errors
    /// The `Abort` to send before giving up.
    pub fn config(self, frame: Frame<'_>, machine: &Machine) -> Result<ExpectMemory, Abort> {
        let Frame::Config(config) = frame else {
            return Err(unexpected(&frame, "Config"));
        };
        machine.compare(&config)?;
        if self.features.contains(Features::OFFERED_MTUS) {
            machine.compare_mtus(&config.offered_mtus)?;
        }
        let source_copies = self.features.contains(Features::RESIDENT);
        Ok(ExpectMemory {
            terms: self.terms,
            layout: config.layout,
            rounds: 0,
            in_round: false,
            received: Pages(0),
            residency: Residency::Pending { source_copies },
        })
    }
}

impl ExpectMemory {
    /// Takes one frame. `mark` is what the stream had brought before this frame.
    ///
    /// # Errors
    /// The `Abort` to send before giving up.
    pub fn frame<'a>(
        mut self,
        frame: Frame<'a>,
        mark: StreamMark,
    ) -> Result<MemoryStep<'a>, Abort> {
        match frame {
            Frame::Memory(batch) => {
                for (run, _) in batch.runs() {
                    if !self.layout.contains(run) {
                        return Err(protocol(format!(
                            "{} pages at {:#x} are not this machine's memory",
                            run.pages().0,
                            run.address()
                        )));
                    }
                    self.received.0 += run.pages().0;
                }
                self.in_round = true;
                Ok(MemoryStep::Apply(self, batch))
            }
            Frame::RoundEnd(end) => self.round_end(&end, mark),
            Frame::State(_) if self.residency != Residency::Complete => Err(protocol(
                "the state came before the memory was resident".to_owned(),
            )),
            Frame::State(piece) if self.rounds > 0 && !self.in_round => {
                let mut state = ExpectState {
                    terms: self.terms,
                    state: Vec::new(),
                };
                state.take(piece)?;
                Ok(MemoryStep::State(state))
            }
            Frame::State(_) => Err(protocol("the state came within a round".to_owned())),
            Frame::Ping { token } => Ok(MemoryStep::Ping(self, token)),
            Frame::Progress(progress) => Ok(MemoryStep::Progress(self, progress)),
            other => Err(unexpected(&other, "Memory, RoundEnd or State")),
        }
    }

    fn round_end<'a>(mut self, end: &RoundEnd, mark: StreamMark) -> Result<MemoryStep<'a>, Abort> {
        if Some(end.round) != self.rounds.checked_add(1) {
            return Err(protocol(format!(
                "round {} ended after round {}",
                end.round, self.rounds
            )));
        }
        if end.marks != [mark] {
            return Err(protocol("a stream's frames are missing".to_owned()));
        }
        self.rounds = end.round;
        self.in_round = false;
        Ok(MemoryStep::RoundEnded(self, end.round))
    }

    /// Whether the source begins to copy only when the memory is resident.
    #[must_use]
    pub fn is_resident_first(&self) -> bool {
        self.residency
            == Residency::Pending {
                source_copies: false,
            }
    }

    /// Whether `Resident` is still to be sent. It is due after the first round was acknowledged.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.residency != Residency::Complete
    }

    /// The memory is resident, or comes from this node's own volume.
    #[must_use]
    pub fn resident(self) -> Self {
        Self {
            residency: Residency::Complete,
            ..self
        }
    }

    /// Pages taken so far, each as often as it came.
    #[must_use]
    pub const fn received(&self) -> Pages {
        self.received
    }
}

impl ExpectState {
    /// Takes one frame.
    ///
    /// # Errors
    /// The `Abort` to send before giving up.
    pub fn frame(mut self, frame: &Frame<'_>) -> Result<StateStep, Abort> {
        match frame {
            Frame::State(piece) => {
                self.take(piece)?;
                Ok(StateStep::More(self))
            }
            Frame::StateEnd(end) => {
                let found = StateEnd {
                    length: Bytes(self.state.len() as u64),
                    crc32c: crc32c::crc32c(&self.state),
                };
                if found != *end {
                    return Err(protocol(
                        "the state's length or checksum differs".to_owned(),
                    ));
                }
                let restoring = Restoring { terms: self.terms };
                Ok(StateStep::Complete(restoring, self.state))
            }
            other => Err(unexpected(other, "State or StateEnd")),
        }
    }

    fn take(&mut self, piece: &[u8]) -> Result<(), Abort> {
        if (self.state.len() + piece.len()) as u64 > STATE_BYTES_MAX {
            return Err(protocol("the state is longer than 16 MiB".to_owned()));
        }
        self.state.extend_from_slice(piece);
        Ok(())
    }
}

impl Restoring {
    /// The machine is restored: `Ready` is about to be sent. From here on the ownership record decides.
    #[must_use]
    pub const fn ready(self) -> ExpectCommit {
        ExpectCommit {
            terms: self.terms,
            link: Link::Up,
        }
    }
}

impl ExpectCommit {
    #[cfg(test)]
    pub(crate) const fn for_model(terms: Terms) -> Self {
        Restoring { terms }.ready()
    }

    /// What this attempt is about.
    #[must_use]
    pub const fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Takes one event.
    ///
    /// # Guarantees
    /// [`CommitStep::Run`] only when the ownership record names this node, or the source reports that it
    /// does.
    /// [`CommitStep::Discard`] only when this attempt can no longer commit, except on
    /// [`CommitEvent::TimedOut`]: after a transfer that is granted later, this node owns the VM without
    /// a process, and restarts it from its disks.
    #[must_use]
    pub fn next(self, event: &CommitEvent) -> CommitStep {
        let orphan = Self {
            link: Link::Down,
            ..self
        };
        match event {
            CommitEvent::Committed(committed)
                if self.link == Link::Up
                    && committed.owner == self.terms.destination
                    && committed.epoch == self.terms.epoch.next() =>
            {
                CommitStep::Run {
                    epoch: committed.epoch,
                }
            }
            // A `Committed` that cannot be true: the stream is not trusted any more.
            CommitEvent::Committed(_) | CommitEvent::StreamLost => CommitStep::QueryVolume(orphan),
            CommitEvent::Aborted if self.link == Link::Up => CommitStep::Discard,
            CommitEvent::Record(row) if self.terms.transferred(row) => {
                CommitStep::Run { epoch: row.epoch }
            }
            CommitEvent::Record(row) if self.terms.held_by_source(row).is_some() => self.again(),
            CommitEvent::Record(_) | CommitEvent::NoRecord | CommitEvent::TimedOut => {
                CommitStep::Discard
            }
            CommitEvent::NoAnswer | CommitEvent::Aborted => self.again(),
        }
    }

    const fn again(self) -> CommitStep {
        match self.link {
            Link::Up => CommitStep::Wait(self),
            Link::Down => CommitStep::QueryVolume(self),
        }
    }
}

impl Machine {
    fn compare(&self, config: &Config) -> Result<(), Abort> {
        let differs = |what: String| Err(Abort::new(AbortReason::MachineDiffers, what));
        if config.vcpus != self.vcpus {
            return differs(format!("{} vCPUs here, {} there", self.vcpus, config.vcpus));
        }
        let (lowest, highest) = self.state_versions;
        if !(lowest..=highest).contains(&config.state_version) {
            return differs(format!(
                "state versions {lowest} to {highest} here, {} there",
                config.state_version
            ));
        }
        if config.layout != self.layout {
            return differs(format!(
                "{} of memory here, {} there, or laid out differently",
                self.layout.total().pages_to_bytes(),
                config.layout.total().pages_to_bytes()
            ));
        }
        if config.description != self.description {
            return differs("devices or CPU features differ".to_owned());
        }
        Ok(())
    }

    /// A driver reads the MTU once, when it starts: on a network with a smaller one, the guest's longest
    /// packets would be lost.
    fn compare_mtus(&self, offered: &[u16]) -> Result<(), Abort> {
        if offered.len() != self.interfaces.len() {
            let (here, there) = (self.interfaces.len(), offered.len());
            return Err(protocol(format!("{here} interfaces here, {there} there")));
        }
        for (index, (interface, &offered)) in self.interfaces.iter().zip(offered).enumerate() {
            let Some(mtu) = interface.mtu.filter(|&mtu| mtu < offered) else {
                continue;
            };
            let text = format!(
                "interfaces[{index}]: the guest uses an MTU of {offered} bytes, bridge {:?} of the \
                 target has {mtu}",
                interface.bridge
            );
            return Err(Abort::new(AbortReason::MachineDiffers, text));
        }
        Ok(())
    }
}

/// Streams that this release uses.
const STREAMS: u16 = 1;

fn common_version(hello: &Hello) -> Result<u16, Abort> {
    let highest = hello.version_max.min(VERSION_MAX);
    if highest < hello.version_min.max(VERSION_MIN) {
        return Err(Abort::new(
            AbortReason::Version,
            format!(
                "protocol versions {VERSION_MIN} to {VERSION_MAX} here, {} to {} there",
                hello.version_min, hello.version_max
            ),
        ));
    }
    if !Features::KNOWN.contains(hello.required) {
        return Err(Abort::new(
            AbortReason::Version,
            format!("required features {:#x} are not known", hello.required.0),
        ));
    }
    Ok(highest)
}

/// The `Abort` for a frame that the phase does not allow. The peer's own `Abort` is returned as it is.
fn unexpected(frame: &Frame<'_>, wanted: &str) -> Abort {
    match frame {
        Frame::Abort(abort) => abort.clone(),
        other => protocol(format!("{:?} came where {wanted} was due", other.kind())),
    }
}

fn protocol(text: String) -> Abort {
    Abort::new(AbortReason::Protocol, text)
}
