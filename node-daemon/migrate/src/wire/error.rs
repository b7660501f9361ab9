//! Why bytes are no frame.

use super::kind::FrameKind;

/// Bytes that are no frame of this protocol, or a stream that ended.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum WireError {
    /// The stream failed, or ended within a frame.
    #[error("the migration stream failed")]
    Io(#[from] std::io::Error),
    /// The first two bytes are not a frame's.
    #[error("not a Bascule migration stream: a frame starts with {found:02x?}")]
    BadMagic {
        /// What was there instead.
        found: [u8; 2],
    },
    /// A kind of frame that this version does not know.
    #[error("unknown frame kind {kind}")]
    UnknownKind { kind: u8 },
    /// A body longer than its kind allows.
    #[error("a {kind:?} frame of {length} bytes; at most {limit} are allowed")]
    TooLong {
        kind: FrameKind,
        /// The length that its header claims.
        length: u32,
        /// The kind's bound.
        limit: u32,
    },
    /// A body that its kind does not allow.
    #[error("malformed {kind:?} frame: {what}")]
    Malformed {
        kind: FrameKind,
        /// The rule that the body violates.
        what: &'static str,
    },
    /// A frame is missing, or came twice.
    #[error("frame {found} came on stream {stream} where {expected} was due")]
    OutOfSequence {
        stream: u16,
        /// The number that was due.
        expected: u32,
        /// The number that came.
        found: u32,
    },
    /// A stream that was not agreed on.
    #[error("a frame on stream {stream}, which was not agreed on")]
    UnknownStream { stream: u16 },
}
