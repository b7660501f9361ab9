//! The frame header and the kinds.

use super::memory::{MEMORY_DATA_BYTES_MAX, MEMORY_RUNS_MAX, RUN_BYTES};
use super::{
    ABORT_TEXT_BYTES_MAX, DESCRIPTION_BYTES_MAX, STATE_PIECE_BYTES_MAX, STREAMS_MAX, StreamId,
    WireError,
};
use crate::pages::REGIONS_MAX;

/// Length of a frame's header.
pub const HEADER_BYTES: usize = 16;
/// What every frame starts with.
const MAGIC: [u8; 2] = [0xba, 0x5c];

/// What a frame is. The numbers are the wire's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[expect(missing_docs, reason = "each is described in the module's table")]
pub enum FrameKind {
    Hello = 1,
    Welcome = 2,
    Config = 3,
    Memory = 4,
    RoundEnd = 5,
    State = 6,
    StateEnd = 7,
    Ready = 8,
    Committed = 9,
    Running = 10,
    Abort = 11,
    Ping = 12,
    Pong = 13,
    RoundAck = 14,
    Progress = 15,
}

/// A checked header: a known kind, an allowed stream, a length within the kind's bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The kind.
    pub kind: FrameKind,
    /// The stream.
    pub stream: StreamId,
    /// Length of the body in bytes.
    pub length: u32,
    /// The frame's number on its stream and in its direction.
    pub number: u32,
}

impl FrameKind {
    /// All kinds, in the wire's order.
    pub const ALL: [Self; 15] = [
        Self::Hello,
        Self::Welcome,
        Self::Config,
        Self::Memory,
        Self::RoundEnd,
        Self::State,
        Self::StateEnd,
        Self::Ready,
        Self::Committed,
        Self::Running,
        Self::Abort,
        Self::Ping,
        Self::Pong,
        Self::RoundAck,
        Self::Progress,
    ];

    /// The kind with this number.
    #[must_use]
    pub fn from_wire(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }

    /// The longest body that a frame of this kind may have.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "constants of at most 2 MiB"
    )]
    pub const fn body_bytes_max(self) -> u32 {
        match self {
            // 104 are used; the rest is for later versions.
            Self::Hello => 512,
            Self::Welcome => 40,
            Self::Config => (16 + REGIONS_MAX * 16 + DESCRIPTION_BYTES_MAX) as u32,
            Self::Memory => (8 + MEMORY_RUNS_MAX * RUN_BYTES + MEMORY_DATA_BYTES_MAX) as u32,
            Self::RoundEnd => 8 + STREAMS_MAX as u32 * 8,
            Self::State => STATE_PIECE_BYTES_MAX as u32,
            Self::StateEnd => 16,
            Self::Ready | Self::Running | Self::Ping | Self::Pong | Self::RoundAck => 8,
            Self::Committed | Self::Progress => 24,
            Self::Abort => 2 + ABORT_TEXT_BYTES_MAX as u32,
        }
    }
}

impl Header {
    /// The header's bytes.
    #[must_use]
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..2].copy_from_slice(&MAGIC);
        bytes[2] = self.kind as u8;
        bytes[4..6].copy_from_slice(&self.stream.number().to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.number.to_le_bytes());
        bytes
    }

    /// The header with these bytes.
    ///
    /// # Errors
    /// [`WireError`]: not a frame, an unknown kind or stream, or a body beyond the kind's bound.
    pub fn decode(bytes: [u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let [
            m0,
            m1,
            kind,
            r0,
            s0,
            s1,
            r1,
            r2,
            l0,
            l1,
            l2,
            l3,
            n0,
            n1,
            n2,
            n3,
        ] = bytes;
        if [m0, m1] != MAGIC {
            return Err(WireError::BadMagic { found: [m0, m1] });
        }
        let kind = FrameKind::from_wire(kind).ok_or(WireError::UnknownKind { kind })?;
        if [r0, r1, r2] != [0; 3] {
            return Err(WireError::Malformed {
                kind,
                what: "reserved bytes of the header are not zero",
            });
        }
        let stream = u16::from_le_bytes([s0, s1]);
        let stream = StreamId::new(stream).ok_or(WireError::UnknownStream { stream })?;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let limit = kind.body_bytes_max();
        if length > limit {
            return Err(WireError::TooLong {
                kind,
                length,
                limit,
            });
        }
        Ok(Self {
            kind,
            stream,
            length,
            number: u32::from_le_bytes([n0, n1, n2, n3]),
        })
    }
}
