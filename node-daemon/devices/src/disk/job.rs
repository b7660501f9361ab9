//! One request on its way: how it is cut into commands, and what its completion means.
//!
//! ```text
//!  waiting ──► transferring ──────────────► done        aligned, or a read
//!     └──────► merging ──► transferring ──► done        a write of parts of blocks
//! ```
//! *Merging* reads the first and last block that the write covers in part.

use std::io;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemory, Permissions, VolatileSlice};

use super::Disk;
use super::buffer::AlignedBuffer;
use super::engine::{DiskRequest, Operation};
use super::ring::HostRun;
use crate::GuestRam;
use crate::virtio::Segments;

/// A request and how far it has come.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) request: DiskRequest,
    /// Its place in the order of arrival.
    pub(super) sequence: u64,
    pub(super) stage: Stage,
    /// Commands that have not completed.
    pub(super) commands_left: usize,
    /// The first error of a command.
    pub(super) error: Option<io::Error>,
    pub(super) bounce: Option<AlignedBuffer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Waiting,
    Merging,
    Transferring,
}

/// One command of a job.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) job: usize,
    pub(super) kind: PartKind,
    /// Where on the volume, in bytes.
    pub(super) offset: u64,
    /// What is still to be transferred.
    pub(super) runs: Vec<HostRun>,
    /// How often the kernel said to try again.
    pub(super) retries: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PartKind {
    Read,
    Write { durable: bool },
    Sync,
}

impl Job {
    /// The disk's blocks that it touches, as a range of bytes that starts and ends on blocks.
    pub(super) fn span(&self, block_bytes: u32) -> (u64, u64) {
        let block = u64::from(block_bytes);
        let (offset, length) = self.request.range();
        let start = offset - offset % block;
        (start, (offset + length).next_multiple_of(block))
    }

    pub(super) fn is_write(&self) -> bool {
        matches!(self.request.operation, Operation::Write { .. })
    }

    /// The bounce buffer that it needs, in bytes; 0 when the guest's memory will do.
    pub(super) fn bounce_bytes(&self, disk: &Disk, ram: &GuestRam) -> usize {
        let (Operation::Read { data, .. } | Operation::Write { data, .. }) =
            &self.request.operation
        else {
            return 0;
        };
        let (start, end) = self.span(disk.block_bytes);
        let (offset, length) = self.request.range();
        let block = usize::try_from(disk.block_bytes).unwrap_or(usize::MAX);
        let whole_blocks = start == offset && end == offset + length;
        let direct = whole_blocks
            && host_runs(ram, data).is_some_and(|runs| {
                runs.len() <= VECTORS_MAX
                    && runs.iter().all(|run| {
                        run.address.is_multiple_of(block) && run.length.is_multiple_of(block)
                    })
            });
        if direct {
            0
        } else {
            usize::try_from(end - start).unwrap_or(usize::MAX)
        }
    }

    /// The commands to begin with, after the job has been let in.
    pub(super) fn begin(
        &mut self,
        disk: &Disk,
        ram: &GuestRam,
    ) -> Vec<(PartKind, u64, Vec<HostRun>)> {
        let bounce_bytes = self.bounce_bytes(disk, ram);
        if bounce_bytes > 0 {
            let align = usize::try_from(disk.block_bytes).unwrap_or(usize::MAX);
            self.bounce = Some(AlignedBuffer::new(bounce_bytes, align));
        }
        self.stage = Stage::Transferring;
        let (start, end) = self.span(disk.block_bytes);
        match &self.request.operation {
            Operation::Flush => vec![(PartKind::Sync, 0, Vec::new())],
            Operation::Read { data, .. } => {
                let runs = self.bounce.as_mut().map_or_else(
                    || host_runs(ram, data).unwrap_or_default(),
                    |bounce| vec![bounce.host_run(0, bounce.len())],
                );
                cut(disk, PartKind::Read, start, &runs)
            }
            Operation::Write { data, durable, .. } => {
                let kind = PartKind::Write { durable: *durable };
                let Some(bounce) = &mut self.bounce else {
                    return cut(disk, kind, start, &host_runs(ram, data).unwrap_or_default());
                };
                let (offset, length) = self.request.range();
                let edges = edges(start, end, offset, length, u64::from(disk.block_bytes));
                if edges.is_empty() {
                    data.read(ram, bounce.bytes_mut());
                    return cut(disk, kind, start, &[bounce.host_run(0, bounce.len())]);
                }
                self.stage = Stage::Merging;
                let block = usize::try_from(disk.block_bytes).unwrap_or(0);
                let read = |edge: u64| {
                    let at = usize::try_from(edge - start).unwrap_or(usize::MAX);
                    cut(disk, PartKind::Read, edge, &[bounce.host_run(at, block)])
                };
                edges.into_iter().flat_map(read).collect()
            }
        }
    }

    /// The write of a job whose edges have been read.
    pub(super) fn merged(
        &mut self,
        disk: &Disk,
        ram: &GuestRam,
    ) -> Vec<(PartKind, u64, Vec<HostRun>)> {
        self.stage = Stage::Transferring;
        let (start, _) = self.span(disk.block_bytes);
        let (offset, _) = self.request.range();
        let (Operation::Write { data, durable, .. }, Some(bounce)) =
            (&self.request.operation, &mut self.bounce)
        else {
            return Vec::new();
        };
        let skip = usize::try_from(offset - start).unwrap_or(usize::MAX);
        data.read(ram, &mut bounce.bytes_mut()[skip..]);
        let kind = PartKind::Write { durable: *durable };
        cut(disk, kind, start, &[bounce.host_run(0, bounce.len())])
    }

    /// A read has ended: its bytes are in guest memory and marked dirty after this. One that failed
    /// may have filled its buffer in part.
    pub(super) fn deliver(&self, disk: &Disk, ram: &GuestRam) {
        let Operation::Read { data, .. } = &self.request.operation else {
            return;
        };
        let Some(bounce) = &self.bounce else {
            for_each_slice(ram, data, |slice| slice.bitmap().mark_dirty(0, slice.len()));
            return;
        };
        if self.error.is_some() {
            return;
        }
        let (start, _) = self.span(disk.block_bytes);
        let (offset, _) = self.request.range();
        let skip = usize::try_from(offset - start).unwrap_or(usize::MAX);
        data.write(ram, &bounce.bytes()[skip..]);
    }
}

impl Part {
    pub(super) fn left_bytes(&self) -> usize {
        self.runs.iter().map(|run| run.length).sum()
    }

    /// Takes off what the kernel has transferred.
    pub(super) fn advance(&mut self, mut done: usize) {
        self.offset += u64::try_from(done).unwrap_or(0);
        self.runs.retain_mut(|run| {
            let here = done.min(run.length);
            done -= here;
            run.address += here;
            run.length -= here;
            run.length > 0
        });
    }
}

/// The blocks of `start..end` of which a write covers only a part: none, one or two.
fn edges(start: u64, end: u64, offset: u64, length: u64, block: u64) -> Vec<u64> {
    let mut edges = Vec::new();
    if offset > start {
        edges.push(start);
    }
    let last = end - block;
    if offset + length < end && !edges.contains(&last) {
        edges.push(last);
    }
    edges
}

/// Cuts a transfer at `start` of the disk into one command per run of the volume.
fn cut(
    disk: &Disk,
    kind: PartKind,
    start: u64,
    runs: &[HostRun],
) -> Vec<(PartKind, u64, Vec<HostRun>)> {
    let total = runs.iter().map(|run| run.length).sum();
    let mut rest = runs.to_vec();
    let mut commands = Vec::new();
    for piece in disk.extents.pieces(start, total) {
        let mut here = Vec::new();
        let mut left = piece.length;
        rest.retain_mut(|run| {
            let length = left.min(run.length);
            if length > 0 {
                here.push(HostRun { length, ..*run });
            }
            left -= length;
            run.address += length;
            run.length -= length;
            run.length > 0
        });
        commands.push((kind, piece.offset, here));
    }
    commands
}

/// Guest memory as the kernel addresses it; none if it is not all memory, which was checked when the
/// request was read.
fn host_runs(ram: &GuestRam, data: &Segments) -> Option<Vec<HostRun>> {
    let mut runs = Vec::new();
    let complete = for_each_slice(ram, data, |slice| {
        runs.push(HostRun {
            address: slice.ptr_guard_mut().as_ptr().expose_provenance(),
            length: slice.len(),
        });
    });
    complete.then_some(runs)
}

type RamSlice<'a> = VolatileSlice<'a, vm_memory::bitmap::BS<'a, vm_memory::bitmap::AtomicBitmap>>;

/// `false` when something of `data` is not guest memory.
fn for_each_slice(ram: &GuestRam, data: &Segments, mut with: impl FnMut(&RamSlice<'_>)) -> bool {
    for segment in data.as_slice() {
        let access = Permissions::ReadWrite;
        let Ok(slices) = GuestMemory::get_slices(ram, segment.start, segment.length_bytes, access)
        else {
            return false;
        };
        for slice in slices {
            let Ok(slice) = slice else {
                return false;
            };
            with(&slice);
        }
    }
    true
}

/// `IOV_MAX`.
const VECTORS_MAX: usize = 1024;
