//! Performs requests on a disk.
//!
//! A request is *enqueued*, becomes a [`Job`] and waits until nothing stands in its way. It is then
//! cut into commands for the kernel, at most one per run of the volume. Commands that write wait
//! for the gate. When its last command has completed, so has the request.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use super::Disk;
use super::job::{Job, Part, PartKind, Stage};
use super::ring::{Command, HostRun, Ring};
use super::slab::Slab;
use crate::GuestRam;
use crate::virtio::Segments;

/// A request on a disk.
#[derive(Clone, Debug)]
pub struct DiskRequest {
    /// Comes back with the completion.
    pub tag: u64,
    /// What to do.
    pub operation: Operation,
}

/// What to do on a disk. Offsets are in bytes from its start; data is guest memory.
#[derive(Clone, Debug)]
pub enum Operation {
    /// Fill `data` from the disk.
    Read {
        /// Where from.
        offset: u64,
        /// Where to.
        data: Segments,
    },
    /// Store `data` on the disk.
    Write {
        /// Where to.
        offset: u64,
        /// Where from.
        data: Segments,
        /// Complete only when it would survive a power cut.
        durable: bool,
    },
    /// Make every write that was enqueued before durable.
    Flush,
}

/// A request that is done.
#[derive(Debug)]
pub struct Completion {
    /// The request's tag.
    pub tag: u64,
    /// Whether it succeeded.
    pub result: io::Result<()>,
}

/// What a disk counts and shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineView {
    /// Writes wait for the gate now.
    pub stalled: bool,
    /// Writes of parts of blocks so far.
    pub merges: u64,
    /// Commands that the kernel works on now.
    pub in_flight: u64,
}

/// One disk with its requests. Used by one thread.
#[derive(Debug)]
pub struct DiskEngine {
    disk: Disk,
    ram: Arc<GuestRam>,
    ring: Ring,
    jobs: Slab<Job>,
    parts: Slab<Part>,
    /// Jobs not let in yet, in order of arrival.
    waiting: VecDeque<usize>,
    /// Commands not submitted yet.
    ready: VecDeque<usize>,
    done: Vec<Completion>,
    next_sequence: u64,
    bounce_bytes: usize,
    failure: Failure,
    view: EngineView,
}

/// Whether a write or flush has failed.
#[derive(Debug)]
enum Failure {
    None,
    /// Not yet told.
    New(&'static str, String),
    Told,
}

impl DiskEngine {
    /// An idle engine.
    ///
    /// # Errors
    /// When the kernel's io_uring cannot be used.
    pub fn new(disk: Disk, ram: Arc<GuestRam>) -> io::Result<Self> {
        Ok(Self {
            disk,
            ram,
            ring: Ring::new()?,
            jobs: Slab::new(),
            parts: Slab::new(),
            waiting: VecDeque::new(),
            ready: VecDeque::new(),
            done: Vec::new(),
            next_sequence: 0,
            bounce_bytes: 0,
            failure: Failure::None,
            view: EngineView::default(),
        })
    }

    /// The disk's size in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.disk.extents.size_bytes()
    }

    /// Becomes readable when commands have completed.
    #[must_use]
    pub fn completion_fd(&self) -> RawFd {
        self.ring.completion_fd()
    }

    /// Whether writes wait for the gate now, and more.
    #[must_use]
    pub fn view(&self) -> EngineView {
        EngineView {
            in_flight: u64::try_from(self.ring.in_flight()).unwrap_or(u64::MAX),
            ..self.view
        }
    }

    /// When [`DiskEngine::progress`] must be called although nothing completed: the gate may open.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.view.stalled.then_some(GATE_POLL)
    }

    /// Takes a request in. Nothing happens before [`DiskEngine::progress`]. A range that is not on
    /// the disk or not in whole sectors is answered with `InvalidInput`.
    pub fn enqueue(&mut self, request: DiskRequest) {
        let (offset, length) = request.range();
        let end = offset.checked_add(length);
        let sectors = offset.is_multiple_of(SECTOR_BYTES) && length.is_multiple_of(SECTOR_BYTES);
        if !sectors || end.is_none_or(|end| end > self.size_bytes()) {
            self.done.push(Completion {
                tag: request.tag,
                result: Err(io::ErrorKind::InvalidInput.into()),
            });
            return;
        }
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let job = self.jobs.insert(Job {
            request,
            sequence,
            stage: Stage::Waiting,
            commands_left: 0,
            error: None,
            bounce: None,
        });
        self.waiting.push_back(job);
    }

    /// Does whatever can be done now, and returns what has completed.
    ///
    /// # Errors
    /// When io_uring itself fails. Nothing more can be submitted then.
    pub fn progress(&mut self) -> io::Result<Vec<Completion>> {
        self.ring.acknowledge();
        loop {
            let reaped = self.reap();
            self.admit();
            let submitted = self.submit()?;
            if reaped == 0 && submitted == 0 {
                return Ok(std::mem::take(&mut self.done));
            }
        }
    }

    /// Waits until nothing is in flight, submitting nothing, and returns what has completed.
    /// Requests that were not submitted, or only in part, stay.
    ///
    /// # Errors
    /// When io_uring itself fails.
    pub fn drain(&mut self) -> io::Result<Vec<Completion>> {
        while self.ring.in_flight() > 0 {
            self.ring.wait()?;
            self.reap();
        }
        Ok(std::mem::take(&mut self.done))
    }

    /// Forgets all requests. The engine must be drained.
    pub fn clear(&mut self) {
        assert_eq!(self.ring.in_flight(), 0, "cleared with commands in flight");
        self.jobs.clear();
        self.parts.clear();
        self.waiting.clear();
        self.ready.clear();
        self.done.clear();
        self.bounce_bytes = 0;
        self.view.stalled = false;
    }

    /// The failure after which no write is submitted any more, once: what failed, and why.
    pub fn take_failure(&mut self) -> Option<(&'static str, String)> {
        match std::mem::replace(&mut self.failure, Failure::Told) {
            Failure::New(what, why) => Some((what, why)),
            other => {
                self.failure = other;
                None
            }
        }
    }

    /// Handles all completions that have come in. Returns how many there were.
    fn reap(&mut self) -> usize {
        let mut count = 0;
        while let Some((tag, result)) = self.ring.reap() {
            count += 1;
            self.command_completed(usize::try_from(tag).unwrap_or(usize::MAX), result);
        }
        count
    }

    fn command_completed(&mut self, place: usize, result: io::Result<usize>) {
        let Some(part) = self.parts.get_mut(place) else {
            return;
        };
        match result {
            Ok(count) if part.kind != PartKind::Sync && count < part.left_bytes() => {
                if count > 0 {
                    part.advance(count);
                    self.ready.push_back(place);
                    return;
                }
                let end = io::Error::new(io::ErrorKind::UnexpectedEof, "end of the device");
                self.part_finished(place, Err(end));
            }
            Ok(_) => self.part_finished(place, Ok(())),
            Err(error) if is_transient(&error) && part.retries < RETRIES_MAX => {
                part.retries += 1;
                self.ready.push_back(place);
            }
            Err(error) => self.part_finished(place, Err(error)),
        }
    }

    fn part_finished(&mut self, place: usize, result: io::Result<()>) {
        let Some(part) = self.parts.remove(place) else {
            return;
        };
        let failed_kind = result.is_err().then_some(part.kind);
        if let (Some(kind), Failure::None, Err(error)) = (failed_kind, &self.failure, &result) {
            match kind {
                PartKind::Write { .. } => self.failure = Failure::New("write", error.to_string()),
                PartKind::Sync => self.failure = Failure::New("flush", error.to_string()),
                PartKind::Read => {}
            }
        }
        let Some(job) = self.jobs.get_mut(part.job) else {
            return;
        };
        job.commands_left -= 1;
        if let Err(error) = result {
            job.error.get_or_insert(error);
        }
        if job.commands_left > 0 {
            return;
        }
        if job.stage == Stage::Merging && job.error.is_none() {
            let commands = job.merged(&self.disk, &self.ram);
            self.add_commands(part.job, commands);
        } else {
            self.job_finished(part.job);
        }
    }

    fn job_finished(&mut self, place: usize) {
        let Some(job) = self.jobs.remove(place) else {
            return;
        };
        job.deliver(&self.disk, &self.ram);
        self.bounce_bytes -= job.bounce.as_ref().map_or(0, |bounce| bounce.len());
        self.done.push(Completion {
            tag: job.request.tag,
            result: job.error.map_or(Ok(()), Err),
        });
    }

    /// Lets waiting jobs in that nothing stands in the way of.
    fn admit(&mut self) {
        for place in std::mem::take(&mut self.waiting) {
            if !self.may_begin(place) {
                self.waiting.push_back(place);
                continue;
            }
            let failed = !matches!(self.failure, Failure::None);
            let Some(job) = self.jobs.get_mut(place) else {
                continue;
            };
            if failed && !matches!(job.request.operation, Operation::Read { .. }) {
                job.error = Some(io::Error::other("the disk has failed"));
                self.job_finished(place);
                continue;
            }
            let commands = job.begin(&self.disk, &self.ram);
            self.bounce_bytes += job.bounce.as_ref().map_or(0, |bounce| bounce.len());
            self.view.merges += u64::from(job.stage == Stage::Merging);
            self.add_commands(place, commands);
        }
    }

    fn may_begin(&self, place: usize) -> bool {
        let Some(job) = self.jobs.get(place) else {
            return true;
        };
        let block_bytes = self.disk.block_bytes;
        let mut earlier_writes = self
            .jobs
            .iter()
            .filter(|other| other.is_write() && other.sequence < job.sequence);
        let free = match job.request.operation {
            Operation::Flush => earlier_writes.next().is_none(),
            Operation::Read { .. } => true,
            Operation::Write { .. } => {
                let (start, end) = job.span(block_bytes);
                earlier_writes.all(|other| {
                    let (other_start, other_end) = other.span(block_bytes);
                    end <= other_start || other_end <= start
                })
            }
        };
        if !free {
            return false;
        }
        let bounce = job.bounce_bytes(&self.disk, &self.ram);
        let budget = bounce == 0 || self.bounce_bytes + bounce <= BOUNCE_BYTES_MAX;
        budget || self.bounce_bytes == 0
    }

    fn add_commands(&mut self, job: usize, commands: Vec<(PartKind, u64, Vec<HostRun>)>) {
        if commands.is_empty() {
            // A request of no bytes.
            self.job_finished(job);
            return;
        }
        if let Some(job) = self.jobs.get_mut(job) {
            job.commands_left = commands.len();
        }
        for (kind, offset, runs) in commands {
            let part = self.parts.insert(Part {
                job,
                kind,
                offset,
                runs,
                retries: 0,
            });
            self.ready.push_back(part);
        }
    }

    /// Submits what may be submitted. Returns how many commands that were.
    fn submit(&mut self) -> io::Result<usize> {
        let mut count = 0;
        self.view.stalled = false;
        for place in std::mem::take(&mut self.ready) {
            let is_write = self
                .parts
                .get(place)
                .is_some_and(|part| matches!(part.kind, PartKind::Write { .. }));
            if is_write && !matches!(self.failure, Failure::None) {
                self.part_finished(place, Err(io::Error::other("the disk has failed")));
                count += 1;
            } else if !self.ring.has_room() || (is_write && self.view.stalled) {
                self.ready.push_back(place);
            } else if is_write && !self.disk.gate.is_open() {
                // From here to the kernel there is nothing but the submission itself, so this
                // answer is as fresh as it can be.
                self.view.stalled = true;
                self.ready.push_back(place);
            } else {
                self.submit_part(place)?;
                count += 1;
            }
        }
        Ok(count)
    }

    #[expect(unsafe_code, reason = "io_uring takes raw addresses")]
    fn submit_part(&mut self, place: usize) -> io::Result<()> {
        let Some(part) = self.parts.get(place) else {
            return Ok(());
        };
        let command = match part.kind {
            PartKind::Read => Command::Read {
                runs: &part.runs,
                offset: part.offset,
            },
            PartKind::Write { durable } => Command::Write {
                runs: &part.runs,
                offset: part.offset,
                durable,
            },
            PartKind::Sync => Command::Sync,
        };
        let tag = u64::try_from(place).map_err(io::Error::other)?;
        // SAFETY: the runs lie in guest memory, which `self.ram` keeps mapped (writable) and into
        // which nobody holds references, or in the job's bounce buffer, which is neither moved,
        // read nor dropped before its last command has completed. Dropping the engine waits for
        // all completions first.
        unsafe { self.ring.submit(&self.disk.file, command, tag) }
    }
}

impl Drop for DiskEngine {
    fn drop(&mut self) {
        if let Err(error) = self.drain() {
            // The kernel may still write to these: they must never be used for anything else.
            tracing::error!(%error, "disk commands in flight cannot be awaited");
            std::mem::forget(std::mem::replace(&mut self.jobs, Slab::new()));
            std::mem::forget(self.ram.clone());
        } else if !self.jobs.is_empty() {
            tracing::debug!("disk closed with unanswered requests");
        }
    }
}

impl DiskRequest {
    /// Offset and length in bytes.
    pub(super) fn range(&self) -> (u64, u64) {
        match &self.operation {
            Operation::Read { offset, data } | Operation::Write { offset, data, .. } => (
                *offset,
                u64::try_from(data.length_bytes()).unwrap_or(u64::MAX),
            ),
            Operation::Flush => (0, 0),
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

const SECTOR_BYTES: u64 = 512;
/// How often a closed gate is looked at: far below a lease's length, far above a check's cost.
const GATE_POLL: Duration = Duration::from_millis(5);
/// Bounds the memory that a guest with misaligned buffers can make us use; one request is always
/// let in. A guess.
const BOUNCE_BYTES_MAX: usize = 32 << 20;
/// A guess; the kernel retries most of these itself.
const RETRIES_MAX: u32 = 16;

#[cfg(test)]
mod tests;
