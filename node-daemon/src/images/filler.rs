//! Fills a disk from its beginning to the end: inspects what comes, writes data, leaves holes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use bascule_image::Inspection;
use bascule_node_api::report::ImportState;
use bascule_types::Bytes;

use super::blocks::{CHUNK_BYTES, Target, chunk_buffer};
use super::job::{ImportJob, Progress, report};
use super::length_limit::{LengthLimit, image_role};
use super::zeroes::is_zero;

/// A disk being filled.
pub(super) struct Filler<'a> {
    job: &'a ImportJob,
    target: &'a mut Target,
    limit: LengthLimit,
    inspection: Inspection,
    /// Bytes that the download has brought.
    downloaded: Arc<AtomicU64>,
    /// Bytes of the disk, from its beginning, that have come.
    filled: u64,
    /// How many of these, at the end, are zeroes that are not yet on the disk.
    zeroes: u64,
}

impl<'a> Filler<'a> {
    pub(super) fn new(
        job: &'a ImportJob,
        target: &'a mut Target,
        limit: LengthLimit,
        downloaded: Arc<AtomicU64>,
    ) -> Self {
        Self {
            job,
            target,
            limit,
            inspection: Inspection::new(image_role(limit.role)),
            downloaded,
            filled: 0,
            zeroes: 0,
        }
    }

    /// Fills the disk from a source of its bytes, which fills the buffer that it is given but at its end.
    pub(super) fn copy(
        &mut self,
        mut source: impl FnMut(&mut [u8]) -> Result<usize>,
    ) -> Result<()> {
        let mut buffer = chunk_buffer();
        loop {
            let length = source(buffer.bytes_mut())?;
            if length == 0 {
                return Ok(());
            }
            self.data(buffer.bytes_mut(), length)?;
        }
    }

    /// The next `length` bytes of the disk: a whole chunk, but at its end.
    pub(super) fn data(&mut self, chunk: &mut [u8], length: usize) -> Result<()> {
        let begin = self.begin(length as u64)?;
        let data = chunk.get(..length).context("a chunk is too short")?;
        self.inspection.feed(data)?;
        if is_zero(data) {
            self.zeroes += length as u64;
        } else {
            self.write_zeroes(begin)?;
            // The tail of the last block reads as zeroes.
            chunk.get_mut(length..).unwrap_or_default().fill(0);
            self.target.write(begin, chunk)?;
        }
        self.advance(length as u64)
    }

    /// The next `length` bytes of the disk, all zero: whole chunks, but at its end.
    pub(super) fn hole(&mut self, length: u64) -> Result<()> {
        self.begin(length)?;
        self.inspection.feed_zeroes(length)?;
        self.zeroes += length;
        self.advance(length)
    }

    /// Says that the download goes on, while nothing is written.
    pub(super) fn report(&self) -> Result<()> {
        let progress = Progress {
            downloaded: Bytes(self.downloaded.load(Ordering::Relaxed)),
            written: Bytes(self.filled),
        };
        report(self.job, progress, ImportState::Running)
    }

    /// Judges the whole image, and makes the rest of the disk zeroes. Returns the image's length.
    pub(super) fn finish(self) -> Result<Bytes> {
        self.inspection.finish()?;
        let written = (self.filled - self.zeroes).next_multiple_of(CHUNK_BYTES as u64);
        let capacity = self.target.capacity();
        let written = written.min(capacity);
        self.target.zero(written, capacity - written)?;
        self.target.flush()?;
        Ok(Bytes(self.filled))
    }

    fn begin(&self, length: u64) -> Result<u64> {
        let begin = self.filled;
        ensure!(
            begin.is_multiple_of(CHUNK_BYTES as u64),
            "a piece of the disk begins at byte {begin}"
        );
        self.limit.check(begin.saturating_add(length))?;
        Ok(begin)
    }

    /// Makes the zeroes before `end` so on the disk: one range, however many pieces it came in.
    fn write_zeroes(&mut self, end: u64) -> Result<()> {
        let zeroes = std::mem::take(&mut self.zeroes);
        self.target.zero(end - zeroes, zeroes)
    }

    fn advance(&mut self, length: u64) -> Result<()> {
        self.filled += length;
        self.report()
    }
}
