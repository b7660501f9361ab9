//! The frames of a zstd file, one after the other (RFC 8878, section 3).

use std::io::{self, BufRead, Read};

use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use crate::MEMORY_BYTES_MAX;

/// Reads the contents of all frames. A frame's checksum and length are checked where it has them.
pub(crate) struct ZstdFrames<R> {
    file: R,
    decoder: FrameDecoder,
    /// Bytes that were read of the present frame; none between two.
    frame_bytes: Option<u64>,
}

impl<R: BufRead> ZstdFrames<R> {
    pub(crate) fn new(file: R) -> Self {
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(MEMORY_BYTES_MAX);
        Self {
            file,
            decoder,
            frame_bytes: None,
        }
    }

    /// Begins the next frame, if there is one; skips what is none of data.
    fn begin_frame(&mut self) -> io::Result<bool> {
        while !self.file.fill_buf()?.is_empty() {
            match self.decoder.reset(&mut self.file) {
                Ok(()) => {
                    self.frame_bytes = Some(0);
                    return Ok(true);
                }
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    let skipped = io::copy(&mut (&mut self.file).take(length), &mut io::sink())?;
                    if skipped < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        Ok(false)
    }

    fn read_frame(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
            let one = BlockDecodingStrategy::UptoBlocks(1);
            self.decoder
                .decode_blocks(&mut self.file, one)
                .map_err(io::Error::other)?;
        }
        self.decoder.read(into)
    }

    fn end_frame(&mut self, length: u64) -> io::Result<()> {
        self.frame_bytes = None;
        // 0 where the frame has no length.
        let announced = self.decoder.content_size();
        if announced != 0 && announced != length {
            let message = format!("a frame of {announced} bytes has {length}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        let wanted = self.decoder.get_checksum_from_data();
        if wanted.is_some() && wanted != self.decoder.get_calculated_checksum() {
            let message = "the checksum of a frame is wrong";
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(())
    }
}

impl<R: BufRead> Read for ZstdFrames<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let Some(before) = self.frame_bytes else {
                if self.begin_frame()? {
                    continue;
                }
                return Ok(0);
            };
            let count = self.read_frame(into)?;
            if count > 0 {
                self.frame_bytes = Some(before + count as u64);
                return Ok(count);
            }
            self.end_frame(before)?;
        }
    }
}
