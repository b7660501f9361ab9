//! The typed bodies.

use std::time::Duration;

use bascule_types::{AttemptId, Bytes, Epoch, Generation, Owner, SlotId, VmUid, VolumeId};

use super::cursor::{Cursor, Put};
use super::error::WireError;
use super::kind::FrameKind;
use super::limits::{ABORT_TEXT_BYTES_MAX, STATE_BYTES_MAX, STREAMS_MAX};
use super::memory::Batch;
use crate::pages::MemoryLayout;

mod opening;

/// The number of a stream; stream 0 carries everything but memory, and memory too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(u16);

/// Optional parts of the protocol, one bit each: see the table of `wire`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features(pub u64);

/// One frame's contents. Large ones borrow from the buffer that they were read into.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is described in the table of `wire`")]
pub enum Frame<'a> {
    Hello(Hello),
    Welcome(Welcome),
    Config(Config),
    Memory(Batch<'a>),
    RoundEnd(RoundEnd),
    State(&'a [u8]),
    StateEnd(StateEnd),
    Ready { restore: Duration },
    Committed(Committed),
    Running { resume: Duration },
    Abort(Abort),
    Ping { token: u64 },
    Pong { token: u64 },
    RoundAck { round: u32 },
    Progress(Progress),
    Resident { took: Duration },
}

/// The first frame: the source, the VM and the attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Hello {
    /// The lowest version that the source speaks.
    pub version_min: u16,
    pub version_max: u16,
    /// Streams that the source would like to use.
    pub streams: u16,
    /// Features that the source can use.
    pub offered: Features,
    /// Features that the source needs.
    pub required: Features,
    /// The VM to migrate.
    pub vm: VmUid,
    /// The attempt that both sides were given.
    pub attempt: AttemptId,
    /// The epoch in which the source owns the VM.
    pub epoch: Epoch,
    /// The source, as it owns the VM.
    pub source: Owner,
    /// The VM's home volume.
    pub volume: VolumeId,
}

/// The destination's answer to `Hello`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Welcome {
    /// The version that both will speak.
    pub version: u16,
    /// Streams that will be used.
    pub streams: u16,
    /// Offered features that will be used.
    pub features: Features,
    /// The destination, as it is to own the VM.
    pub destination: Owner,
    /// How long restoring the state is estimated to take.
    pub restore_estimate: Duration,
}

/// The machine that the destination must have built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Number of virtual CPUs.
    pub vcpus: u16,
    /// Version of the device state that will be sent.
    pub state_version: u32,
    /// The RAM, in pages.
    pub layout: MemoryLayout,
    /// What else must be equal on both sides, as the adapter writes it.
    pub description: Vec<u8>,
    /// The MTU in bytes that was offered to the guest on each interface, in the order of the
    /// interfaces, 0 where none was. Empty unless [`Features::OFFERED_MTUS`] is used.
    pub offered_mtus: Vec<u16>,
}

/// How many frames a stream had sent when a round ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct StreamMark {
    pub stream: StreamId,
    /// Frames sent on it before this one, wrapping.
    pub frames: u32,
}

/// The end of one pass over the memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoundEnd {
    /// The round, from 1.
    pub round: u32,
    /// One mark per stream.
    pub marks: Vec<StreamMark>,
}

/// The end of the device state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct StateEnd {
    pub length: Bytes,
    /// CRC32C over it.
    pub crc32c: u32,
}

/// The volume has transferred the ownership to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Committed {
    pub epoch: Epoch,
    /// The new owner: the destination.
    pub owner: Owner,
}

/// How far pre-copy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Progress {
    pub round: u32,
    /// Bytes sent since the start.
    pub sent: Bytes,
    /// Bytes that are still to be sent, as known now.
    pub remaining: Bytes,
}

/// The sender gives the attempt up.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Abort {
    /// Why, for programs.
    pub reason: AbortReason,
    /// The cause, for logs and status messages; truncated to the maximum length.
    pub text: String,
}

/// Why an attempt was given up. The numbers are the wire's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AbortReason {
    /// 1: it was cancelled.
    Cancelled,
    /// 2: no common version, or a required feature is missing.
    Version,
    /// 3: another VM, attempt or volume than the destination waits for.
    WrongAttempt,
    /// 4: the destination's machine differs from the source's.
    MachineDiffers,
    /// 5: the peer sent what the protocol does not allow.
    Protocol,
    /// 6: the state could not be restored.
    Restore,
    /// 7: the guest writes faster than the link carries.
    NotConverging,
    /// 8: the volume refused the transfer, and the source still owns the VM.
    CommitRefused,
    /// 9: the peer did not send in time.
    Timeout,
    /// 10: something else failed; the text says what.
    Internal,
    /// A reason that a later version knows.
    Other(u16),
}

impl StreamId {
    /// The stream that carries all frames but memory, and memory too.
    pub const FIRST: Self = Self(0);

    /// The stream with this number, if there may be one.
    #[must_use]
    pub const fn new(number: u16) -> Option<Self> {
        if number < STREAMS_MAX {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The number on the wire.
    #[must_use]
    pub const fn number(self) -> u16 {
        self.0
    }
}

impl Features {
    /// `Config` has the MTUs that were offered to the guest.
    pub const OFFERED_MTUS: Self = Self(1);
    /// The destination makes its memory resident while the source already copies, and says when it is: `Resident`.
    pub const RESIDENT: Self = Self(2);
    /// All features that this release knows.
    pub const KNOWN: Self = Self(Self::OFFERED_MTUS.0 | Self::RESIDENT.0);

    /// The features in both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether all of `needed` are in it.
    #[must_use]
    pub const fn contains(self, needed: Self) -> bool {
        needed.0 & !self.0 == 0
    }
}

impl AbortReason {
    /// The number on the wire.
    #[must_use]
    pub const fn number(self) -> u16 {
        match self {
            Self::Cancelled => 1,
            Self::Version => 2,
            Self::WrongAttempt => 3,
            Self::MachineDiffers => 4,
            Self::Protocol => 5,
            Self::Restore => 6,
            Self::NotConverging => 7,
            Self::CommitRefused => 8,
            Self::Timeout => 9,
            Self::Internal => 10,
            Self::Other(number) => number,
        }
    }

    /// The reason with this number.
    #[must_use]
    pub const fn from_wire(number: u16) -> Self {
        match number {
            1 => Self::Cancelled,
            2 => Self::Version,
            3 => Self::WrongAttempt,
            4 => Self::MachineDiffers,
            5 => Self::Protocol,
            6 => Self::Restore,
            7 => Self::NotConverging,
            8 => Self::CommitRefused,
            9 => Self::Timeout,
            10 => Self::Internal,
            other => Self::Other(other),
        }
    }
}

impl Abort {
    /// The reason with a text, cut at a character's boundary to what a frame carries.
    #[must_use]
    pub fn new(reason: AbortReason, text: impl Into<String>) -> Self {
        let mut text = text.into();
        text.truncate(text.floor_char_boundary(ABORT_TEXT_BYTES_MAX));
        Self { reason, text }
    }
}

impl<'a> Frame<'a> {
    /// The kind that the frame header carries.
    #[must_use]
    pub const fn kind(&self) -> FrameKind {
        match self {
            Self::Hello(_) => FrameKind::Hello,
            Self::Welcome(_) => FrameKind::Welcome,
            Self::Config(_) => FrameKind::Config,
            Self::Memory(_) => FrameKind::Memory,
            Self::RoundEnd(_) => FrameKind::RoundEnd,
            Self::State(_) => FrameKind::State,
            Self::StateEnd(_) => FrameKind::StateEnd,
            Self::Ready { .. } => FrameKind::Ready,
            Self::Committed(_) => FrameKind::Committed,
            Self::Running { .. } => FrameKind::Running,
            Self::Abort(_) => FrameKind::Abort,
            Self::Ping { .. } => FrameKind::Ping,
            Self::Pong { .. } => FrameKind::Pong,
            Self::RoundAck { .. } => FrameKind::RoundAck,
            Self::Progress(_) => FrameKind::Progress,
            Self::Resident { .. } => FrameKind::Resident,
        }
    }

    /// The frame with this body.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn decode(kind: FrameKind, body: &'a [u8]) -> Result<Self, WireError> {
        let mut cursor = Cursor::new(kind, body);
        let frame = match kind {
            FrameKind::Hello => return Hello::decode(cursor).map(Self::Hello),
            FrameKind::Memory => return Batch::decode(body).map(Self::Memory),
            FrameKind::State if body.is_empty() => return Err(cursor.malformed("empty piece")),
            FrameKind::State => return Ok(Self::State(body)),
            FrameKind::Abort => return Abort::decode(cursor).map(Self::Abort),
            FrameKind::Config => Self::Config(Config::decode(&mut cursor)?),
            FrameKind::Welcome => Self::Welcome(Welcome::decode(&mut cursor)?),
            FrameKind::RoundEnd => Self::RoundEnd(RoundEnd::decode(&mut cursor)?),
            FrameKind::StateEnd => Self::StateEnd(StateEnd::decode(&mut cursor)?),
            FrameKind::Ready => Self::Ready {
                restore: Duration::from_nanos(cursor.u64()?),
            },
            FrameKind::Committed => Self::Committed(Committed {
                epoch: Epoch(cursor.u64()?),
                owner: owner_of(&mut cursor)?,
            }),
            FrameKind::Running => Self::Running {
                resume: Duration::from_nanos(cursor.u64()?),
            },
            FrameKind::Ping => Self::Ping {
                token: cursor.u64()?,
            },
            FrameKind::Pong => Self::Pong {
                token: cursor.u64()?,
            },
            FrameKind::RoundAck => {
                let round = cursor.u32()?;
                cursor.reserved(4)?;
                Self::RoundAck { round }
            }
            FrameKind::Progress => Self::Progress(Progress::decode(&mut cursor)?),
            FrameKind::Resident => Self::Resident {
                took: Duration::from_nanos(cursor.u64()?),
            },
        };
        cursor.end()?;
        Ok(frame)
    }

    /// Appends the body. `Memory` is written by `BatchBuilder`, so that contents are not copied
    /// twice; decoded ones append nothing here.
    pub(super) fn put_body(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hello(hello) => hello.put(out),
            Self::Welcome(welcome) => welcome.put(out),
            Self::Config(config) => config.put(out),
            Self::Memory(_) => {}
            Self::RoundEnd(end) => end.put(out),
            Self::State(piece) => out.extend_from_slice(piece),
            Self::StateEnd(end) => {
                out.put_u64(end.length.0);
                out.put_u32(end.crc32c);
                out.put_zeroes(4);
            }
            Self::Ready { restore: time }
            | Self::Running { resume: time }
            | Self::Resident { took: time } => put_nanos(out, *time),
            Self::Committed(committed) => {
                out.put_u64(committed.epoch.0);
                put_owner(out, committed.owner);
            }
            Self::Abort(abort) => {
                out.put_u16(abort.reason.number());
                out.extend_from_slice(abort.text.as_bytes());
            }
            Self::Ping { token } | Self::Pong { token } => out.put_u64(*token),
            Self::RoundAck { round } => {
                out.put_u32(*round);
                out.put_zeroes(4);
            }
            Self::Progress(progress) => {
                out.put_u32(progress.round);
                out.put_zeroes(4);
                out.put_u64(progress.sent.0);
                out.put_u64(progress.remaining.0);
            }
        }
    }
}

impl RoundEnd {
    fn decode(cursor: &mut Cursor<'_>) -> Result<Self, WireError> {
        let (round, streams) = (cursor.u32()?, cursor.u32()?);
        if streams == 0 || streams > u32::from(STREAMS_MAX) {
            return Err(cursor.malformed("1 to 64 streams"));
        }
        let mut marks = Vec::with_capacity(usize::from(STREAMS_MAX));
        for _ in 0..streams {
            let stream =
                StreamId::new(cursor.u16()?).ok_or_else(|| cursor.malformed("no such stream"))?;
            cursor.reserved(2)?;
            marks.push(StreamMark {
                stream,
                frames: cursor.u32()?,
            });
        }
        Ok(Self { round, marks })
    }

    fn put(&self, out: &mut Vec<u8>) {
        out.put_u32(self.round);
        out.put_u32(u32::try_from(self.marks.len()).unwrap_or(u32::MAX));
        for mark in &self.marks {
            out.put_u16(mark.stream.number());
            out.put_zeroes(2);
            out.put_u32(mark.frames);
        }
    }
}

impl StateEnd {
    fn decode(cursor: &mut Cursor<'_>) -> Result<Self, WireError> {
        let (length, crc32c) = (Bytes(cursor.u64()?), cursor.u32()?);
        cursor.reserved(4)?;
        if length.0 > STATE_BYTES_MAX {
            return Err(cursor.malformed("the state is longer than 16 MiB"));
        }
        Ok(Self { length, crc32c })
    }
}

impl Progress {
    fn decode(cursor: &mut Cursor<'_>) -> Result<Self, WireError> {
        let round = cursor.u32()?;
        cursor.reserved(4)?;
        Ok(Self {
            round,
            sent: Bytes(cursor.u64()?),
            remaining: Bytes(cursor.u64()?),
        })
    }
}

impl Abort {
    fn decode(mut cursor: Cursor<'_>) -> Result<Self, WireError> {
        let reason = AbortReason::from_wire(cursor.u16()?);
        let text = str::from_utf8(cursor.rest()).map_err(|_| cursor.malformed("not UTF-8"))?;
        Ok(Self {
            reason,
            text: text.to_owned(),
        })
    }
}

fn owner_of(cursor: &mut Cursor<'_>) -> Result<Owner, WireError> {
    let slot = SlotId(cursor.u16()?);
    cursor.reserved(6)?;
    Ok(Owner {
        slot,
        generation: Generation(cursor.u64()?),
    })
}

fn put_owner(out: &mut Vec<u8>, owner: Owner) {
    out.put_u16(owner.slot.0);
    out.put_zeroes(6);
    out.put_u64(owner.generation.0);
}

/// Nanoseconds; 584 years at most.
fn put_nanos(out: &mut Vec<u8>, time: Duration) {
    out.put_u64(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
}
