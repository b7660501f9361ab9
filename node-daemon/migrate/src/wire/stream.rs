//! Frames on a byte stream: numbered on the way out, bounded and checked on the way in.

use std::io::{self, Read, Write};

use super::error::WireError;
use super::frame::{HEADER_BYTES, Header};
use super::kind::FrameKind;
use super::memory::BatchBuilder;
use super::message::{Frame, StreamId, StreamMark};

/// How much is read at once while a body arrives: memory is allocated as bytes come, not as the
/// header announces them.
const READ_STEP_BYTES: usize = 64 << 10;

/// Writes one direction of one stream.
#[derive(Debug)]
pub struct FrameWriter {
    stream: StreamId,
    number: u32,
    scratch: Vec<u8>,
}

/// Reads one direction of one stream. The buffer is kept from frame to frame.
#[derive(Debug)]
pub struct FrameBuffer {
    stream: StreamId,
    number: u32,
    body: Vec<u8>,
}

impl FrameWriter {
    /// A writer for `stream`, from frame 0.
    #[must_use]
    pub const fn new(stream: StreamId) -> Self {
        Self {
            stream,
            number: 0,
            scratch: Vec::new(),
        }
    }

    /// Frames sent so far, as `RoundEnd` wants to know.
    #[must_use]
    pub const fn mark(&self) -> StreamMark {
        StreamMark {
            stream: self.stream,
            frames: self.number,
        }
    }

    /// Writes one frame other than `Memory`, and returns its length with header.
    ///
    /// # Errors
    /// Those of the stream; [`io::ErrorKind::InvalidInput`] for a body beyond its kind's bound.
    pub fn send(&mut self, to: &mut impl Write, frame: &Frame<'_>) -> io::Result<u64> {
        let mut out = std::mem::take(&mut self.scratch);
        out.clear();
        out.resize(HEADER_BYTES, 0);
        frame.put_body(&mut out);
        let result = self
            .header(frame.kind(), out.len() - HEADER_BYTES)
            .and_then(|header| {
                out[..HEADER_BYTES].copy_from_slice(&header.encode());
                to.write_all(&out)
            });
        let sent = out.len() as u64;
        self.scratch = out;
        result.map(|()| sent)
    }

    /// Writes what `batch` has collected, empties it and returns the frame's length with header.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn send_batch(&mut self, to: &mut impl Write, batch: &mut BatchBuilder) -> io::Result<u64> {
        let (head, data) = batch.parts();
        let length = head.len() + data.len();
        let header = self.header(FrameKind::Memory, length)?;
        let mut out = std::mem::take(&mut self.scratch);
        out.clear();
        out.extend_from_slice(&header.encode());
        out.extend_from_slice(head);
        let result = to.write_all(&out).and_then(|()| to.write_all(data));
        self.scratch = out;
        batch.clear();
        result.map(|()| (HEADER_BYTES + length) as u64)
    }

    fn header(&mut self, kind: FrameKind, length: usize) -> io::Result<Header> {
        let length = u32::try_from(length)
            .ok()
            .filter(|&length| length <= kind.body_bytes_max())
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "frame body too long"))?;
        let header = Header {
            kind,
            stream: self.stream,
            length,
            number: self.number,
        };
        self.number = self.number.wrapping_add(1);
        Ok(header)
    }
}

impl FrameBuffer {
    /// A reader for `stream`, from frame 0.
    #[must_use]
    pub const fn new(stream: StreamId) -> Self {
        Self {
            stream,
            number: 0,
            body: Vec::new(),
        }
    }

    /// Frames received so far.
    #[must_use]
    pub const fn mark(&self) -> StreamMark {
        StreamMark {
            stream: self.stream,
            frames: self.number,
        }
    }

    /// Reads the next frame, waiting for it.
    ///
    /// # Errors
    /// [`WireError`]. The stream cannot be used after an error.
    pub fn receive<'b>(&'b mut self, from: &mut impl Read) -> Result<Frame<'b>, WireError> {
        let mut bytes = [0; HEADER_BYTES];
        from.read_exact(&mut bytes)?;
        let header = Header::decode(bytes)?;
        if header.stream != self.stream {
            return Err(WireError::UnknownStream {
                stream: header.stream.number(),
            });
        }
        if header.number != self.number {
            return Err(WireError::OutOfSequence {
                stream: header.stream.number(),
                expected: self.number,
                found: header.number,
            });
        }
        self.number = self.number.wrapping_add(1);
        let length = usize::try_from(header.length).unwrap_or(usize::MAX);
        let mut have = 0;
        while have < length {
            let end = length.min(have + READ_STEP_BYTES);
            // The room of earlier frames is kept, so that it is not cleared again and again.
            if self.body.len() < end {
                self.body.resize(end, 0);
            }
            from.read_exact(&mut self.body[have..end])?;
            have = end;
        }
        Frame::decode(header.kind, &self.body[..length])
    }
}
