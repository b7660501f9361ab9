//! Where the bytes of a disk are on its volume, and writing them there with direct I/O.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
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
    /// Of the writes of data.
    pub(crate) pace: Pace,
    /// Of ranges of zeroes: a device that makes holes is faster than its writes.
    pub(crate) zero_pace: Pace,
    /// Whether the device is a file without holes, and is to stay one.
    pub(crate) is_thick: bool,
}

/// Whether all of a device is a file's allocated storage.
pub(crate) fn is_thick(device: &File) -> io::Result<bool> {
    let metadata = device.metadata()?;
    // In units of 512 bytes (stat(2)).
    Ok(metadata.is_file() && metadata.blocks().saturating_mul(512) >= metadata.len())
}

impl Target {
    pub(crate) fn capacity(&self) -> u64 {
        self.runs.iter().map(|run| run.length.0).sum()
    }

    /// Writes whole blocks at `offset` of the disk. The chunk lies within one run, because runs are
    /// whole extents and chunks divide them.
    pub(crate) fn write(&mut self, offset: u64, block: &[u8]) -> Result<()> {
        let start = self.locate(offset)?;
        let mut pace = std::mem::take(&mut self.pace);
        let written = in_pieces(&mut pace, start, block.len() as u64, |at, length| {
            let begin = usize::try_from(at - start).context("chunk's length")?;
            let end = begin + usize::try_from(length).context("chunk's length")?;
            let piece = block.get(begin..end).context("chunk's length")?;
            self.guarded(|| self.device.write_all_at(piece, at))
                .with_context(|| format!("write at byte {at}"))
        });
        self.pace = pace;
        written
    }

    /// Makes `length` bytes from `offset` on read as zeroes, without storage for them where the device can.
    pub(crate) fn zero(&mut self, offset: u64, length: u64) -> Result<()> {
        let end = offset + length;
        let mut begin = 0;
        let mut pace = std::mem::take(&mut self.zero_pace);
        for run in &self.runs {
            let run_end = begin + run.length.0;
            let (from, to) = (offset.max(begin), end.min(run_end));
            if from < to {
                let start = run.start.lba_to_bytes().context("extent's position")?;
                in_pieces(
                    &mut pace,
                    start.0 + (from - begin),
                    to - from,
                    |at, length| {
                        self.zero_range(at, length)
                            .with_context(|| format!("zero at byte {at}"))
                    },
                )?;
            }
            begin = run_end;
        }
        self.zero_pace = pace;
        Ok(())
    }

    pub(crate) fn flush(&self) -> Result<()> {
        let flushed = self.device.sync_data();
        if let (Err(_), Some(page)) = (&flushed, &self.page) {
            page.write_failed();
        }
        flushed.context("flush the device")
    }

    /// Zeroes without sending them: a hole, or else zeroes that keep their storage. Both read as zeroes
    /// (fallocate(2); of devices, `blkdev_issue_zeroout` without a fallback). Else by writing.
    fn zero_range(&self, at: u64, length: u64) -> Result<()> {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let ways = [hole, FallocateFlags::ZERO_RANGE];
        for flags in ways.iter().skip(usize::from(self.is_thick)) {
            let zeroed = self.guarded(|| match fallocate(&self.device, *flags, at, length) {
                Ok(()) => Ok(true),
                Err(Errno::OPNOTSUPP | Errno::INVAL) => Ok(false),
                Err(errno) => Err(errno.into()),
            });
            if zeroed? {
                return Ok(());
            }
        }
        let zeroes = chunk_buffer();
        let mut done = 0;
        while done < length {
            let step = usize::try_from(length - done).unwrap_or(usize::MAX);
            let bytes = zeroes.bytes();
            let piece = bytes.get(..step.min(CHUNK_BYTES)).unwrap_or(bytes);
            self.guarded(|| self.device.write_all_at(piece, at + done))?;
            done += piece.len() as u64;
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

/// Calls `write` with the position on the device and the length of each piece.
fn in_pieces(
    pace: &mut Pace,
    start: u64,
    length: u64,
    write: impl Fn(u64, u64) -> Result<()>,
) -> Result<()> {
    let mut done = 0;
    while done < length {
        let piece = pace.piece(length - done);
        let begun = Instant::now();
        write(start + done, piece)?;
        pace.took(piece, begun.elapsed());
        done += piece;
    }
    Ok(())
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
