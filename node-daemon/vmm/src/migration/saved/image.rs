//! An image's bytes on the volume: whole aligned blocks, direct I/O, every write through the gate.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bascule_devices::disk::WriteGate;
use bascule_migrate::wire::{
    BatchBuilder, Config, Hello, RoundEnd, STATE_PIECE_BYTES_MAX, StateEnd, StreamId,
};
use bascule_migrate::{Frame, FrameWriter};
use bascule_types::{AlignedBuffer, Bytes, ExtentRun, SavedStateSum};

use crate::dirty::DirtyBitmap;
use crate::memory::GuestMemory;
use crate::migration::control::MigrationControl;
use crate::migration::copy::{Copier, CopyError, Sink};

/// The extents of an image.
#[derive(Debug)]
pub struct SavedArea {
    /// The volume's device.
    pub device: Arc<File>,
    /// The extents, in order.
    pub extents: Vec<ExtentRun>,
    /// Passed by every write; none for an area that is only read.
    pub gate: Option<Arc<dyn WriteGate>>,
}

/// Direct I/O wants memory, offset and length aligned to a volume block.
const ALIGNMENT: usize = 4096;
/// Bytes written or read at once.
const PIECE_BYTES: usize = 1 << 20;
/// Longest wait for a closed gate, with the guest stopped.
const GATE_TIMEOUT: Duration = Duration::from_secs(10);
/// Poll interval of a closed gate.
const GATE_POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Writes an image.
#[derive(Debug)]
pub struct ImageWriter {
    area: Place,
    gate: Arc<dyn WriteGate>,
    piece: Piece,
    length: u64,
    crc32c: u32,
}

/// Reads an image of known length.
#[derive(Debug)]
pub struct ImageReader {
    area: Place,
    piece: Piece,
    given: usize,
    left: u64,
    crc32c: u32,
}

/// A position in an area.
#[derive(Debug)]
struct Place {
    device: Arc<File>,
    extents: std::vec::IntoIter<ExtentRun>,
    /// Offset on the device and what is left of the present run, in bytes.
    run: (u64, u64),
}

/// One buffer for direct I/O, and how much of it is filled.
#[derive(Debug)]
struct Piece {
    memory: AlignedBuffer,
    filled: usize,
}

/// Writes the whole image and flushes it to the disk.
pub(super) fn write(
    area: SavedArea,
    memory: &Arc<GuestMemory>,
    (hello, config): (Hello, Config),
    state: &[u8],
    control: &MigrationControl,
) -> Result<SavedStateSum, CopyError> {
    let mut out = ImageWriter::new(area).map_err(CopyError::Sink)?;
    let mut frames = FrameWriter::new(StreamId::FIRST);
    let head = |frames: &mut FrameWriter, out: &mut ImageWriter| {
        frames.send(out, &Frame::Hello(hello.clone()))?;
        frames.send(out, &Frame::Config(config.clone()))
    };
    head(&mut frames, &mut out).map_err(CopyError::Sink)?;
    let mut sink = ImageSink {
        frames: &mut frames,
        out: &mut out,
        control,
    };
    Copier::new(Arc::clone(memory)).pass(&DirtyBitmap::full(memory), None, true, &mut sink)?;
    let mut tail = || {
        let marks = vec![frames.mark()];
        frames.send(&mut out, &Frame::RoundEnd(RoundEnd { round: 1, marks }))?;
        for piece in state.chunks(STATE_PIECE_BYTES_MAX) {
            frames.send(&mut out, &Frame::State(piece))?;
        }
        let end = StateEnd {
            length: Bytes(state.len() as u64),
            crc32c: crc32c::crc32c(state),
        };
        frames.send(&mut out, &Frame::StateEnd(end))
    };
    tail().map_err(CopyError::Sink)?;
    out.finish().map_err(CopyError::Sink)
}

struct ImageSink<'a> {
    frames: &'a mut FrameWriter,
    out: &'a mut ImageWriter,
    control: &'a MigrationControl,
}

impl Sink for ImageSink<'_> {
    fn take(&mut self, batch: &mut BatchBuilder) -> io::Result<()> {
        if self.control.is_cancelled() {
            return Err(io::Error::other("the migration was cancelled"));
        }
        self.frames.send_batch(self.out, batch)?;
        let bytes = Bytes(self.out.length);
        self.control.update(|status| status.bytes = bytes);
        Ok(())
    }
}

impl ImageWriter {
    /// A writer from the start of `area`.
    ///
    /// # Errors
    /// For an area without a gate: it is only to be read.
    pub fn new(area: SavedArea) -> io::Result<Self> {
        let gate = area
            .gate
            .ok_or_else(|| io::Error::other("no gate to write through"))?;
        Ok(Self {
            area: Place::new(area.device, area.extents),
            gate,
            piece: Piece::new(),
            length: 0,
            crc32c: 0,
        })
    }

    /// Writes what is left and flushes the device.
    ///
    /// # Errors
    /// Those of the device, and a full area.
    pub fn finish(mut self) -> io::Result<SavedStateSum> {
        if self.piece.filled > 0 {
            self.write_piece()?;
        }
        if let Err(error) = self.area.device.sync_data() {
            self.gate.write_failed();
            return Err(error);
        }
        Ok(SavedStateSum {
            length: Bytes(self.length),
            crc32c: self.crc32c,
        })
    }

    fn write_piece(&mut self) -> io::Result<()> {
        let whole = self.piece.filled.next_multiple_of(ALIGNMENT);
        self.piece.zero_to(whole);
        let mut done = 0;
        while done < whole {
            let (offset, room) = self.area.here()?;
            let end = whole.min(done.saturating_add(room));
            let written = self.write_at(offset, done..end)?;
            done += written;
            self.area.advance(written);
        }
        self.piece.filled = 0;
        Ok(())
    }

    fn write_at(&self, offset: u64, range: Range<usize>) -> io::Result<usize> {
        let begun = self.await_gate()?;
        let bytes = &self.piece.all()[range];
        let device = &self.area.device;
        let written = rustix::io::retry_on_intr(|| rustix::io::pwrite(device, bytes, offset));
        if written.is_err() {
            self.gate.write_failed();
        }
        drop(begun);
        match written? {
            0 => Err(io::ErrorKind::WriteZero.into()),
            count => Ok(count),
        }
    }

    /// Right before each write: waits for the gate, which is told of the write until the guard is
    /// dropped.
    fn await_gate(&self) -> io::Result<BegunGuard<'_>> {
        let deadline = Instant::now() + GATE_TIMEOUT;
        loop {
            let begun = BegunGuard::new(&*self.gate);
            if self.gate.is_open() {
                return Ok(begun);
            }
            drop(begun);
            if Instant::now() >= deadline {
                return Err(io::Error::other("the volume's gate stays closed"));
            }
            std::thread::sleep(GATE_POLL_INTERVAL);
        }
    }
}

/// While it lives, a write may be under way.
struct BegunGuard<'a>(&'a dyn WriteGate);

impl<'a> BegunGuard<'a> {
    fn new(gate: &'a dyn WriteGate) -> Self {
        gate.write_begins();
        Self(gate)
    }
}

impl Drop for BegunGuard<'_> {
    fn drop(&mut self) {
        self.0.writes_ended();
    }
}

impl Write for ImageWriter {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        if self.piece.filled == PIECE_BYTES {
            self.write_piece()?;
        }
        let filled = self.piece.filled;
        let room = &mut self.piece.all_mut()[filled..];
        let count = room.len().min(from.len());
        room[..count].copy_from_slice(&from[..count]);
        self.piece.filled += count;
        self.length += count as u64;
        self.crc32c = crc32c::crc32c_append(self.crc32c, &from[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ImageReader {
    /// A reader of the image of this length.
    #[must_use]
    pub fn new(area: SavedArea, length: Bytes) -> Self {
        Self {
            area: Place::new(area.device, area.extents),
            piece: Piece::new(),
            given: 0,
            left: length.0,
            crc32c: 0,
        }
    }

    /// The checksum over all that was read, and whether that is the whole image.
    #[must_use]
    pub const fn checksum(&self) -> (u32, bool) {
        (self.crc32c, self.left == 0)
    }

    fn refill(&mut self) -> io::Result<()> {
        let (offset, room) = self.area.here()?;
        let end = PIECE_BYTES.min(room);
        let into = &mut self.piece.all_mut()[..end];
        let read =
            rustix::io::retry_on_intr(|| rustix::io::pread(&self.area.device, &mut *into, offset))?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.area.advance(read);
        self.piece.filled = read;
        self.given = 0;
        Ok(())
    }
}

impl Read for ImageReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(into.len());
        if wanted == 0 {
            return Ok(0);
        }
        if self.given == self.piece.filled {
            self.refill()?;
        }
        let ready = &self.piece.all()[self.given..self.piece.filled];
        let count = wanted.min(ready.len());
        into[..count].copy_from_slice(&ready[..count]);
        self.crc32c = crc32c::crc32c_append(self.crc32c, &into[..count]);
        self.given += count;
        self.left -= count as u64;
        Ok(count)
    }
}

impl Place {
    fn new(device: Arc<File>, extents: Vec<ExtentRun>) -> Self {
        Self {
            device,
            extents: extents.into_iter(),
            run: (0, 0),
        }
    }

    /// The offset on the device, and how much of the run is left there.
    fn here(&mut self) -> io::Result<(u64, usize)> {
        while self.run.1 == 0 {
            let next = self.extents.next().ok_or(io::ErrorKind::StorageFull)?;
            let offset = next.start.lba_to_bytes().map_err(io::Error::other)?;
            self.run = (offset.0, next.length.0);
        }
        Ok((
            self.run.0,
            usize::try_from(self.run.1).unwrap_or(usize::MAX),
        ))
    }

    const fn advance(&mut self, count: usize) {
        self.run.0 += count as u64;
        self.run.1 = self.run.1.saturating_sub(count as u64);
    }
}

impl Piece {
    fn new() -> Self {
        Self {
            memory: AlignedBuffer::new(PIECE_BYTES, ALIGNMENT),
            filled: 0,
        }
    }

    fn all(&self) -> &[u8] {
        self.memory.bytes()
    }

    fn all_mut(&mut self) -> &mut [u8] {
        self.memory.bytes_mut()
    }

    fn zero_to(&mut self, end: usize) {
        let filled = self.filled;
        self.all_mut()[filled..end].fill(0);
    }
}

#[cfg(test)]
mod tests;
