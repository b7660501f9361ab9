//! The kinds of frames, and how long each may be.

use super::limits::{
    ABORT_TEXT_BYTES_MAX, DESCRIPTION_BYTES_MAX, INTERFACES_MAX, MEMORY_DATA_BYTES_MAX,
    MEMORY_RUNS_MAX, RUN_BYTES, STATE_PIECE_BYTES_MAX, STREAMS_MAX,
};
use crate::pages::REGIONS_MAX;

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
    Resident = 16,
}

impl FrameKind {
    /// All kinds, in the wire's order.
    pub const ALL: [Self; 16] = [
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
        Self::Resident,
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
            Self::Config => {
                (16 + REGIONS_MAX * 16 + DESCRIPTION_BYTES_MAX + INTERFACES_MAX * 2) as u32
            }
            Self::Memory => (8 + MEMORY_RUNS_MAX * RUN_BYTES + MEMORY_DATA_BYTES_MAX) as u32,
            Self::RoundEnd => 8 + STREAMS_MAX as u32 * 8,
            Self::State => STATE_PIECE_BYTES_MAX as u32,
            Self::StateEnd => 16,
            Self::Ready
            | Self::Running
            | Self::Ping
            | Self::Pong
            | Self::RoundAck
            | Self::Resident => 8,
            Self::Committed | Self::Progress => 24,
            Self::Abort => 2 + ABORT_TEXT_BYTES_MAX as u32,
        }
    }
}
