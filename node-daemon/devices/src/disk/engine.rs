//! Performs requests on a disk.
//!
//! A request is *enqueued*, becomes a [`Job`] and waits ([`Waiting`]) until no earlier overlapping write is
//! unfinished, and none that failed on its blocks may land. It is then split into [`SubRequest`]s, at most
//! one per extent run, each of which is one command of the [`Ring`]. Writes wait for the gate. The request
//! completes with its last sub-request.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use bascule_types::WriterState;

use super::backend::Disk;
use super::errors::{Failure, HeldBack};
use super::job::{Job, Stage, SubRequest, SubRequestKind};
use super::overlap::Arrival;
use super::ready::Ready;
use super::request::{Completion, DiskRequest};
use super::ring::{HostRun, Ring, UringRing};
use super::rules::{Rules, broken};
use super::slab::Slab;
use super::unsettled::Unsettled;
use super::waiting::Waiting;
use crate::guest_ram::GuestRam;
use failed::{PROBE, Suspects};

mod failed;
mod submission;

/// Counters and state of an engine at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Requests are waiting for the gate, for the path to the device, or for a failed write to settle, now.
    pub stalled: bool,
    /// Writes that covered a block in part, each of which cost a read, since the engine was made.
    pub read_modify_writes: u64,
    /// Commands submitted to the kernel and not yet completed.
    pub in_flight: u64,
    /// Unclean, permanently, after the first write or flush that failed.
    pub writer_state: WriterState,
}

/// The result of [`DiskEngine::drain`].
#[derive(Debug)]
pub struct Drained {
    /// The requests that have completed, with success or with an error.
    pub completions: Vec<Completion>,
    /// Whether all writes have ended. An idle engine that is unclean still has a write that may
    /// land later.
    pub writer_state: WriterState,
}

/// Performs the requests on one disk. Used by one thread.
#[derive(Debug)]
pub struct DiskEngine<R: Ring = UringRing> {
    disk: Disk,
    ram: Arc<GuestRam>,
    ring: R,
    rules: Rules,
    jobs: Slab<Job>,
    sub_requests: Slab<SubRequest>,
    waiting: Waiting,
    ready: Ready,
    completed: Vec<Completion>,
    next_sequence: u64,
    /// Bytes of all bounce buffers in use.
    bounce_bytes: usize,
    failure: Failure,
    held_back: HeldBack,
    suspects: Suspects,
    unsettled: Unsettled,
    /// The last [`DiskEngine::progress`] ended although more can go on.
    has_more: bool,
    /// Writes that the kernel has and has not completed.
    writes_in_flight: usize,
    /// The gate was told that a write begins, and not yet that none is in flight.
    told_begin: bool,
    stats: EngineStats,
}

impl DiskEngine {
    /// An engine without requests.
    ///
    /// # Errors
    /// When io_uring is not available.
    pub fn new(disk: Disk, ram: Arc<GuestRam>) -> io::Result<Self> {
        let ring = UringRing::new(&disk.file)?;
        Ok(Self::with_ring(disk, ram, ring))
    }

    /// An eventfd that becomes readable when commands have completed.
    #[must_use]
    pub fn completion_fd(&self) -> RawFd {
        self.ring.completion_fd()
    }
}

impl<R: Ring> DiskEngine<R> {
    /// An engine without requests, whose commands `ring` performs.
    #[must_use]
    pub fn with_ring(disk: Disk, ram: Arc<GuestRam>, ring: R) -> Self {
        Self {
            unsettled: Unsettled::new(disk.settle),
            disk,
            ram,
            ring,
            rules: Rules::ENFORCED,
            jobs: Slab::new(),
            sub_requests: Slab::new(),
            waiting: Waiting::default(),
            ready: Ready::default(),
            completed: Vec::new(),
            next_sequence: 0,
            bounce_bytes: 0,
            failure: Failure::None,
            held_back: HeldBack::default(),
            suspects: Suspects::default(),
            has_more: false,
            writes_in_flight: 0,
            told_begin: false,
            stats: EngineStats::default(),
        }
    }

    /// What performs its commands, of a simulation.
    #[cfg(feature = "fault-injection")]
    #[must_use]
    pub fn ring(&self) -> &R {
        &self.ring
    }

    /// The same engine with other rules.
    #[cfg(feature = "fault-injection")]
    #[must_use]
    pub fn with_rules(mut self, rules: Rules) -> Self {
        self.rules = rules;
        self
    }

    /// The disk's size in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.disk.extents.size_bytes()
    }

    /// Counters, and whether writes are waiting for the gate.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        EngineStats {
            stalled: self.stats.stalled || self.waiting.awaits_settling(),
            in_flight: u64::try_from(self.ring.in_flight()).unwrap_or(u64::MAX),
            ..self.stats
        }
    }

    /// After which time [`DiskEngine::progress`] must be called even if nothing completes: at once if it
    /// ended early; a stalled write polls the gate, a lost path is tried again, and a failed write has
    /// settled. `None` when nothing is stalled.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        if self.has_more {
            return Some(Duration::ZERO);
        }
        let now = self.ring.now();
        let stalled = self.stats.stalled.then(|| self.held_back.poll_after(now));
        let settling = self.waiting.settling_wait(now);
        [stalled.flatten(), settling].into_iter().flatten().min()
    }

    /// Queues a request, which [`DiskEngine::progress`] submits. A range that is not on the disk or
    /// not in whole sectors completes with `InvalidInput`.
    pub fn enqueue(&mut self, request: DiskRequest) {
        let (offset, length) = request.range();
        let end = offset.checked_add(length);
        let sectors = offset.is_multiple_of(SECTOR_BYTES) && length.is_multiple_of(SECTOR_BYTES);
        if !sectors || end.is_none_or(|end| end > self.size_bytes()) {
            self.completed.push(Completion {
                tag: request.tag,
                result: Err(io::ErrorKind::InvalidInput.into()),
            });
            return;
        }
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let job = Job::new(request, sequence, &self.disk, &self.ram);
        let key = self.jobs.insert(job);
        if let Some(job) = self.jobs.get(key) {
            let arrival = Arrival { sequence, job: key };
            self.waiting
                .arrived(arrival, &job.request.operation, job.span);
        }
    }

    /// Reaps completions and submits all requests that may be submitted now. Returns the requests
    /// that have completed since the last call.
    ///
    /// On a device that is as fast as this it ends early ([`DiskEngine::retry_after`]), so that whoever calls it can
    /// pause the disk before all that is queued is done.
    ///
    /// # Errors
    /// When io_uring itself fails. No further request can be submitted then.
    pub fn progress(&mut self) -> io::Result<Vec<Completion>> {
        self.ring.acknowledge();
        self.has_more = false;
        let mut rounds = 0;
        while self.round()? {
            rounds += 1;
            if rounds == ROUNDS_MAX {
                self.has_more = true;
                break;
            }
        }
        self.tell_ended();
        Ok(std::mem::take(&mut self.completed))
    }

    /// Reaps what has completed, begins what may begin then and submits it. Returns whether there was anything.
    fn round(&mut self) -> io::Result<bool> {
        let reaped = self.reap();
        self.admit();
        let submitted = self.submit()?;
        Ok(reaped > 0 || submitted > 0)
    }

    /// Waits, without submitting anything, until no command is in flight. Returns the requests that
    /// have completed. Requests that were not submitted, or only in part, stay queued.
    ///
    /// # Errors
    /// When io_uring itself fails; the engine is then unclean.
    pub fn drain(&mut self) -> io::Result<Drained> {
        while self.ring.in_flight() > 0 {
            if let Err(error) = self.ring.wait() {
                self.becomes_unclean();
                return Err(error);
            }
            self.reap();
        }
        self.tell_ended();
        Ok(Drained {
            completions: std::mem::take(&mut self.completed),
            writer_state: self.stats.writer_state,
        })
    }

    /// Whether every write and flush that was submitted so far has succeeded. Never becomes clean
    /// again.
    pub fn writer_state(&self) -> WriterState {
        self.stats.writer_state
    }

    /// Drops all queued requests without completing them. The writer state stays, and so does what failed
    /// and may land.
    ///
    /// # Panics
    /// When commands are in flight: the engine must be drained first.
    pub fn clear(&mut self) {
        assert_eq!(self.ring.in_flight(), 0, "cleared with commands in flight");
        self.jobs.clear();
        self.sub_requests.clear();
        self.waiting.clear();
        self.ready.clear();
        self.completed.clear();
        self.suspects.clear();
        self.bounce_bytes = 0;
        self.stats.stalled = false;
        self.has_more = false;
        self.retry_held();
    }

    /// The request that is held since the last call, as (operation, error).
    pub fn take_held(&mut self) -> Option<(&'static str, String)> {
        self.held_back.take()
    }

    /// Has the next [`DiskEngine::progress`] submit what was held back after an error.
    pub fn retry_held(&mut self) {
        self.held_back.retry();
    }

    /// The first failure of a write or flush, as (operation, error). Returned once.
    pub fn take_failure(&mut self) -> Option<(&'static str, String)> {
        self.failure.take()
    }

    /// Handles all completions that the kernel has posted. Returns their number.
    fn reap(&mut self) -> usize {
        let mut count = 0;
        while let Some((tag, result)) = self.ring.reap() {
            count += 1;
            self.command_completed(usize::try_from(tag).unwrap_or(usize::MAX), result);
        }
        count
    }

    fn command_completed(&mut self, key: usize, result: io::Result<usize>) {
        if key == PROBE {
            return self.probe_answered(result.as_ref().err());
        }
        let Some(sub_request) = self.sub_requests.get_mut(key) else {
            return;
        };
        if sub_request.kind.is_write() {
            self.writes_in_flight -= 1;
        }
        match result {
            Ok(count)
                if sub_request.kind != SubRequestKind::Sync && count < sub_request.left_bytes() =>
            {
                if count > 0 {
                    sub_request.advance(count);
                    let is_write = sub_request.kind.is_write();
                    self.ready.push(key, is_write);
                    return;
                }
                let end = io::Error::new(io::ErrorKind::UnexpectedEof, "end of the device");
                self.sub_request_finished(key, Err(end));
            }
            Ok(_) => self.sub_request_finished(key, Ok(())),
            Err(error) => self.command_failed(key, error),
        }
    }

    /// A read that failed has no effect; a write or flush is reported, and leaves the engine unclean:
    /// an error does not end a write, it may still land.
    fn note_failure(&mut self, job: usize, kind: SubRequestKind, error: &io::Error) {
        if kind == SubRequestKind::Read {
            return;
        }
        if !broken!(self.rules, FailedWriteEnds) {
            self.failure.note(kind.operation(), error);
            self.becomes_unclean();
        }
        let job = self.jobs.get(job).filter(|job| job.is_write());
        if let Some(job) = job {
            self.unsettled.failed(job.span, self.ring.now());
        }
    }

    fn sub_request_finished(&mut self, key: usize, result: io::Result<()>) {
        let Some(sub_request) = self.sub_requests.remove(key) else {
            return;
        };
        if let Err(error) = &result {
            self.note_failure(sub_request.job, sub_request.kind, error);
        }
        let Some(job) = self.jobs.get_mut(sub_request.job) else {
            return;
        };
        job.sub_requests_left -= 1;
        if let Err(error) = result {
            job.error.get_or_insert(error);
        }
        if job.sub_requests_left > 0 {
            return;
        }
        if job.stage == Stage::ReadModifyWrite && job.error.is_none() {
            let commands = job.modify(&self.disk, &self.ram);
            self.add_sub_requests(sub_request.job, commands);
        } else {
            self.job_finished(sub_request.job);
        }
    }

    fn job_finished(&mut self, key: usize) {
        let Some(job) = self.jobs.remove(key) else {
            return;
        };
        if job.is_write() {
            let sequence = job.sequence;
            self.waiting.finished(Arrival { sequence, job: key });
        }
        job.deliver(&self.ram);
        self.bounce_bytes -= job.bounce.as_ref().map_or(0, |bounce| bounce.len());
        self.completed.push(Completion {
            tag: job.request.tag,
            result: job.error.map_or(Ok(()), Err),
        });
    }

    /// Begins the waiting jobs that nothing holds back.
    fn admit(&mut self) {
        self.waiting.free_settled(|| self.ring.now());
        while let Some(next) = self.waiting.next(|bytes| fits(bytes, self.bounce_bytes)) {
            let arrival = next.arrival;
            let Some(job) = self.jobs.get(arrival.job) else {
                continue;
            };
            let checks = job.is_write() && !broken!(self.rules, OverlapBeforeSettle);
            let now = || self.ring.now();
            let blocked = checks.then(|| self.unsettled.blocked_until(job.span, now));
            if let Some(until) = blocked.flatten() {
                self.waiting.settles(arrival, until);
            } else if job.bounce_bytes > 0 && !next.has_room {
                let (is_write, bytes) = (job.is_write(), job.bounce_bytes);
                self.waiting.awaits_room(arrival, is_write, bytes);
            } else {
                self.begin(arrival.job);
            }
        }
    }

    fn begin(&mut self, key: usize) {
        let Some(job) = self.jobs.get_mut(key) else {
            return;
        };
        let commands = job.begin(&self.disk, &self.ram);
        self.bounce_bytes += job.bounce.as_ref().map_or(0, |bounce| bounce.len());
        self.stats.read_modify_writes += u64::from(job.stage == Stage::ReadModifyWrite);
        self.add_sub_requests(key, commands);
    }

    fn add_sub_requests(&mut self, job: usize, commands: Vec<(SubRequestKind, u64, Vec<HostRun>)>) {
        if commands.is_empty() {
            // A request of zero bytes.
            self.job_finished(job);
            return;
        }
        if let Some(job) = self.jobs.get_mut(job) {
            job.sub_requests_left = commands.len();
        }
        for (kind, offset, runs) in commands {
            let sub_request = self.sub_requests.insert(SubRequest {
                job,
                kind,
                offset,
                runs,
                retries: 0,
                is_suspect: false,
            });
            self.ready.push(sub_request, kind.is_write());
        }
    }
}

impl<R: Ring> Drop for DiskEngine<R> {
    fn drop(&mut self) {
        if let Err(error) = self.drain() {
            // The kernel may still write to this memory: leak it, so that it is never reused.
            tracing::error!(%error, "cannot wait for disk commands in flight; their memory is leaked");
            std::mem::forget(std::mem::replace(&mut self.jobs, Slab::new()));
            std::mem::forget(std::mem::take(&mut self.suspects));
            std::mem::forget(self.ram.clone());
        } else if !self.jobs.is_empty() {
            tracing::debug!("disk closed with incomplete requests");
        }
    }
}

/// Whether a bounce buffer of `bytes` may be allocated beside those in use. One always may, whatever its size.
const fn fits(bytes: usize, in_use: usize) -> bool {
    in_use == 0 || in_use + bytes <= BOUNCE_BYTES_MAX
}

const SECTOR_BYTES: u64 = 512;
/// Rounds of one [`DiskEngine::progress`]. Each copies at most [`BOUNCE_BYTES_MAX`] to and as much from bounce buffers:
/// together some 100 ms at most. A guess.
const ROUNDS_MAX: usize = 8;
/// Limit on the sum of bounce buffers, which a guest with misaligned buffers makes us allocate. A guess.
const BOUNCE_BYTES_MAX: usize = 32 << 20;

#[cfg(test)]
mod tests;
