//! Where the bytes of a disk are on its volume, and writing them there with direct I/O.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bascule_types::{AlignedBuffer, ExtentRun, Owner};
use bascule_volume_gate::{GateReader, Pace, WriterPage, boot_time_now};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

/// The disk being filled.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) device: File,
    pub(crate) gate: GateReader,
    /// None from a `bascule-volume` of an earlier release.
    pub(crate) page: Option<WriterPage>,
    pub(crate) owner: Owner,
    pub(crate) runs: Vec<ExtentRun>,
    pub(crate) pace: Pace,
}

impl Target {
    pub(crate) fn capacity(&self) -> u64 {
        self.runs.iter().map(|run| run.length.0).sum()
    }

    /// Writes whole blocks at `offset` of the disk. The chunk lies within one run, because runs are
    /// whole extents and chunks divide them.
    pub(crate) fn write(&mut self, offset: u64, block: &[u8]) -> Result<()> {
        let start = self.locate(offset)?;
        self.in_pieces(start, block.len() as u64, |target, at, length| {
            let begin = usize::try_from(at - start).context("chunk's length")?;
            let end = begin + usize::try_from(length).context("chunk's length")?;
            let piece = block.get(begin..end).context("chunk's length")?;
            target
                .guarded(|| target.device.write_all_at(piece, at))
                .with_context(|| format!("write at byte {at}"))
        })
    }

    /// Makes everything from `offset` to the disk's end read as zeroes.
    pub(crate) fn zero_from(&mut self, offset: u64) -> Result<()> {
        let mut begin = 0;
        for run in self.runs.clone() {
            let end = begin + run.length.0;
            if end > offset {
                let skip = offset.saturating_sub(begin);
                let at = run.start.lba_to_bytes().context("extent's position")?.0 + skip;
                self.in_pieces(at, run.length.0 - skip, Self::zero_range)?;
            }
            begin = end;
        }
        Ok(())
    }

    pub(crate) fn flush(&self) -> Result<()> {
        let flushed = self.device.sync_data();
        if let (Err(_), Some(page)) = (&flushed, &self.page) {
            page.write_failed();
        }
        flushed.context("flush the device")
    }

    /// Calls `write` with the position on the device and the length of each piece.
    fn in_pieces(
        &mut self,
        start: u64,
        length: u64,
        write: impl Fn(&Self, u64, u64) -> Result<()>,
    ) -> Result<()> {
        let mut done = 0;
        while done < length {
            let piece = self.pace.piece(length - done);
            let begun = Instant::now();
            write(self, start + done, piece)?;
            self.pace.took(piece, begun.elapsed());
            done += piece;
        }
        Ok(())
    }

    fn zero_range(&self, at: u64, length: u64) -> Result<()> {
        // Zeroes without sending them, where the device or the file system can.
        let zeroed = self.guarded(|| {
            match fallocate(&self.device, FallocateFlags::ZERO_RANGE, at, length) {
                Ok(()) => Ok(true),
                Err(Errno::OPNOTSUPP | Errno::INVAL) => Ok(false),
                Err(errno) => Err(errno.into()),
            }
        });
        if zeroed.with_context(|| format!("zero at byte {at}"))? {
            return Ok(());
        }
        let zeroes = chunk_buffer();
        let chunk = zeroes.bytes();
        let mut done = 0;
        while done < length {
            let step = usize::try_from(length - done)
                .unwrap_or(usize::MAX)
                .min(chunk.len());
            let piece = chunk.get(..step).unwrap_or_default();
            self.guarded(|| self.device.write_all_at(piece, at + done))
                .with_context(|| format!("zero at byte {}", at + done))?;
            done += step as u64;
        }
        Ok(())
    }

    fn locate(&self, offset: u64) -> Result<u64> {
        let mut begin = 0;
        for run in &self.runs {
            if offset < begin + run.length.0 {
                let start = run.start.lba_to_bytes().context("extent's position")?;
                return Ok(start.0 + (offset - begin));
            }
            begin += run.length.0;
        }
        bail!("the image is larger than the disk ({begin} bytes)")
    }

    /// Writes once, right after the gate's check. Waits while the lease is not valid; fails for good when
    /// another owner has the disk. The writer page says that the write is under way, and whether it
    /// failed.
    fn guarded<T>(&self, write: impl FnOnce() -> io::Result<T>) -> Result<T> {
        let closed = || self.gate.check(boot_time_now(), self.owner).err();
        let page = self.page.as_ref();
        // The page first: see `bascule_volume_gate::writer_page`.
        let try_begin = || {
            page.inspect(|page| page.write_begins());
            let is_open = closed().is_none();
            if !is_open {
                page.inspect(|page| page.writes_ended());
            }
            is_open.then_some(())
        };
        if crate::wait::wait_for(GATE_LIMIT, try_begin).is_none() {
            bail!("the volume's gate stays closed: {:?}", closed());
        }
        let written = write();
        if written.is_err() {
            page.inspect(|page| page.write_failed());
        }
        page.inspect(|page| page.writes_ended());
        Ok(written?)
    }
}

/// A zeroed buffer of one chunk, aligned for direct I/O.
pub(crate) fn chunk_buffer() -> AlignedBuffer {
    AlignedBuffer::new(CHUNK_BYTES, ALIGNMENT)
}

/// One write: divides every extent (1 MiB or more).
pub(crate) const CHUNK_BYTES: usize = 1 << 20;
/// The largest logical block of today's disks.
const ALIGNMENT: usize = 4096;
/// A lease comes back within seconds, or the node is being fenced.
const GATE_LIMIT: Duration = Duration::from_secs(60);
