//! Compressed files as streams.

use std::io::{self, BufRead, Read};

use bascule_image::Compression;
use flate2::bufread::MultiGzDecoder;
use lzma_rust2::XzReader;

use crate::MEMORY_BYTES_MAX;
use crate::zstd_frames::ZstdFrames;

/// Reads the contents of a compressed file: of all its members, streams or frames. A file that is damaged,
/// truncated or followed by other bytes is an error, as is one that needs more than [`MEMORY_BYTES_MAX`].
pub struct Decompressor<R: BufRead>(Kind<R>);

enum Kind<R: BufRead> {
    Gzip(MultiGzDecoder<R>),
    Xz(Box<XzReader<R>>),
    Zstd(Box<ZstdFrames<R>>),
}

impl<R: BufRead> Decompressor<R> {
    /// Of a file that `compression` was recognized in.
    pub fn new(compression: Compression, file: R) -> Self {
        Self(match compression {
            Compression::Gzip => Kind::Gzip(MultiGzDecoder::new(file)),
            Compression::Xz => {
                let reader = XzReader::new_mem_limit(file, true, XZ_MEMORY_KIB_MAX);
                Kind::Xz(Box::new(reader))
            }
            Compression::Zstd => Kind::Zstd(Box::new(ZstdFrames::new(file))),
        })
    }
}

impl<R: BufRead> Read for Decompressor<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        // An xz stream that is asked for nothing takes that for its end.
        if into.is_empty() {
            return Ok(0);
        }
        match &mut self.0 {
            Kind::Gzip(reader) => reader.read(into),
            Kind::Xz(reader) => reader.read(into),
            Kind::Zstd(reader) => reader.read(into),
        }
    }
}

impl<R: BufRead> std::fmt::Debug for Decompressor<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let compression = match self.0 {
            Kind::Gzip(_) => Compression::Gzip,
            Kind::Xz(_) => Compression::Xz,
            Kind::Zstd(_) => Compression::Zstd,
        };
        f.debug_tuple("Decompressor").field(&compression).finish()
    }
}

/// The dictionary, and the megabyte that the decoder needs beside it.
#[expect(clippy::cast_possible_truncation, reason = "a constant of 18 bits")]
const XZ_MEMORY_KIB_MAX: u32 = (MEMORY_BYTES_MAX >> 10) as u32 + 1024;
