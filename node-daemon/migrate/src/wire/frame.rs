//! The frame header.

use super::error::WireError;
use super::kind::FrameKind;
use super::message::StreamId;

/// Length of a frame's header.
pub const HEADER_BYTES: usize = 16;
/// What every frame starts with.
const MAGIC: [u8; 2] = [0xba, 0x5c];

/// A checked header: a known kind, an allowed stream, a length within the kind's bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Header {
    pub kind: FrameKind,
    pub stream: StreamId,
    /// Length of the body in bytes.
    pub length: u32,
    /// The frame's number on its stream and in its direction.
    pub number: u32,
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
