//! One request in progress: how it is split into sub-requests, and what their completion means.
//!
//! # States
//! ```text
//!  waiting ──► transferring ──────────────────────► done    whole blocks, or a read
//!     └──────► read-modify-write ──► transferring ──► done    a write of parts of blocks
//! ```
//! *Read-modify-write* reads the first and last block if the write covers them only in part.

use std::io;

use bascule_types::AlignedBuffer;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemory, Permissions, VolatileSlice};

use super::backend::Disk;
use super::overlap::Span;
use super::request::{DiskRequest, Operation};
use super::ring::HostRun;
use super::steps::step;
use crate::guest_ram::GuestRam;
use crate::virtio::Segments;

/// A request and its progress.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) request: DiskRequest,
    /// Rises by one with each request of the engine: the order of arrival.
    pub(super) sequence: u64,
    /// The range of bytes of the disk that the request touches, extended to whole blocks.
    pub(super) span: Span,
    /// The size of the bounce buffer that the request needs, in bytes; 0 when the guest's memory is aligned to blocks
    /// and needs none.
    pub(super) bounce_bytes: usize,
    pub(super) stage: Stage,
    /// Sub-requests of the current stage that have not completed.
    pub(super) sub_requests_left: usize,
    /// The first error of a sub-request.
    pub(super) error: Option<io::Error>,
    /// Used when the guest's memory is not aligned to device blocks.
    pub(super) bounce: Option<AlignedBuffer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Waiting,
    ReadModifyWrite,
    Transferring,
}

/// A part of a job that is contiguous on the volume: one io_uring command.
#[derive(Debug)]
pub(super) struct SubRequest {
    /// The key of the job.
    pub(super) job: usize,
    pub(super) kind: SubRequestKind,
    /// The first byte on the volume.
    pub(super) offset: u64,
    /// The memory that is still to be transferred.
    pub(super) runs: Vec<HostRun>,
    /// How often it was submitted again after a transient error.
    pub(super) retries: u32,
    /// It failed with `EIO` while the device was there.
    pub(super) is_suspect: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SubRequestKind {
    Read,
    Write { durable: bool },
    Sync,
}

impl SubRequestKind {
    pub(super) const fn is_write(self) -> bool {
        matches!(self, Self::Write { .. })
    }

    /// Its name in messages.
    pub(super) const fn operation(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write { .. } => "write",
            Self::Sync => "flush",
        }
    }
}

impl Job {
    /// A job that waits. Looks at every segment of the request: later, its length and alignment are known.
    pub(super) fn new(request: DiskRequest, sequence: u64, disk: &Disk, ram: &GuestRam) -> Self {
        let span = span(&request, disk.block_bytes);
        Self {
            bounce_bytes: bounce_bytes(&request, span, disk, ram),
            request,
            sequence,
            span,
            stage: Stage::Waiting,
            sub_requests_left: 0,
            error: None,
            bounce: None,
        }
    }

    pub(super) fn is_write(&self) -> bool {
        matches!(self.request.operation, Operation::Write { .. })
    }

    /// Begins the job. Returns its first sub-requests.
    pub(super) fn begin(
        &mut self,
        disk: &Disk,
        ram: &GuestRam,
    ) -> Vec<(SubRequestKind, u64, Vec<HostRun>)> {
        if self.bounce_bytes > 0 {
            let align = usize::try_from(disk.block_bytes).unwrap_or(usize::MAX);
            self.bounce = Some(AlignedBuffer::new(self.bounce_bytes, align));
        }
        self.stage = Stage::Transferring;
        let (start, end) = self.span;
        match &self.request.operation {
            Operation::Flush => vec![(SubRequestKind::Sync, 0, Vec::new())],
            Operation::Read { data, .. } => {
                let runs = self.bounce.as_mut().map_or_else(
                    || host_runs(ram, data).unwrap_or_default(),
                    |bounce| vec![HostRun::of(bounce.bytes_mut())],
                );
                split(disk, SubRequestKind::Read, start, &runs)
            }
            Operation::Write { data, durable, .. } => {
                let kind = SubRequestKind::Write { durable: *durable };
                let Some(bounce) = &mut self.bounce else {
                    return split(disk, kind, start, &host_runs(ram, data).unwrap_or_default());
                };
                let (offset, length) = self.request.range();
                let partial_blocks =
                    partial_blocks(start, end, offset, length, u64::from(disk.block_bytes));
                if partial_blocks.is_empty() {
                    data.read(ram, bounce.bytes_mut());
                    return split(disk, kind, start, &[HostRun::of(bounce.bytes_mut())]);
                }
                self.stage = Stage::ReadModifyWrite;
                let block = usize::try_from(disk.block_bytes).unwrap_or(0);
                let read = |block_start: u64| {
                    let at = usize::try_from(block_start - start).unwrap_or(usize::MAX);
                    split(
                        disk,
                        SubRequestKind::Read,
                        block_start,
                        &[HostRun::of(&mut bounce.bytes_mut()[at..at + block])],
                    )
                };
                partial_blocks.into_iter().flat_map(read).collect()
            }
        }
    }

    /// Copies the guest's data over the blocks that were read. Returns the sub-requests that write
    /// them.
    pub(super) fn modify(
        &mut self,
        disk: &Disk,
        ram: &GuestRam,
    ) -> Vec<(SubRequestKind, u64, Vec<HostRun>)> {
        self.stage = Stage::Transferring;
        let (start, _) = self.span;
        let (offset, _) = self.request.range();
        let (Operation::Write { data, durable, .. }, Some(bounce)) =
            (&self.request.operation, &mut self.bounce)
        else {
            return Vec::new();
        };
        let skip = usize::try_from(offset - start).unwrap_or(usize::MAX);
        data.read(ram, &mut bounce.bytes_mut()[skip..]);
        let kind = SubRequestKind::Write { durable: *durable };
        split(disk, kind, start, &[HostRun::of(bounce.bytes_mut())])
    }

    /// Completes a read: copies the bounce buffer, if any, to guest memory and marks the pages
    /// dirty. A failed read without a bounce buffer may have been filled in part, so its pages are
    /// marked too.
    pub(super) fn deliver(&self, ram: &GuestRam) {
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
        let (start, _) = self.span;
        let (offset, _) = self.request.range();
        let skip = usize::try_from(offset - start).unwrap_or(usize::MAX);
        data.write(ram, &bounce.bytes()[skip..]);
    }
}

impl SubRequest {
    pub(super) fn left_bytes(&self) -> usize {
        self.runs.iter().map(|run| run.length).sum()
    }

    /// Skips the `done` bytes that the kernel has transferred.
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

fn span(request: &DiskRequest, block_bytes: u32) -> Span {
    let block = u64::from(block_bytes);
    let (offset, length) = request.range();
    let start = offset - offset % block;
    (start, (offset + length).next_multiple_of(block))
}

fn bounce_bytes(request: &DiskRequest, (start, end): Span, disk: &Disk, ram: &GuestRam) -> usize {
    let (Operation::Read { data, .. } | Operation::Write { data, .. }) = &request.operation else {
        return 0;
    };
    let (offset, length) = request.range();
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

/// The starts of the blocks in `start..end` that a write covers only in part: none, one or two.
fn partial_blocks(start: u64, end: u64, offset: u64, length: u64, block: u64) -> Vec<u64> {
    let mut partial_blocks = Vec::new();
    if offset > start {
        partial_blocks.push(start);
    }
    let last = end - block;
    if offset + length < end && !partial_blocks.contains(&last) {
        partial_blocks.push(last);
    }
    partial_blocks
}

/// Splits a transfer at byte `start` of the disk into one sub-request per extent run.
fn split(
    disk: &Disk,
    kind: SubRequestKind,
    start: u64,
    runs: &[HostRun],
) -> Vec<(SubRequestKind, u64, Vec<HostRun>)> {
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

/// The host addresses of guest memory. `None` if `data` is not all guest memory, which cannot happen:
/// it was checked when the descriptor chain was read.
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

/// `false` when part of `data` is not guest memory.
fn for_each_slice(ram: &GuestRam, data: &Segments, mut with: impl FnMut(&RamSlice<'_>)) -> bool {
    step(data.as_slice().len());
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

/// `IOV_MAX`: vectors per `readv` or `writev`.
const VECTORS_MAX: usize = 1024;
