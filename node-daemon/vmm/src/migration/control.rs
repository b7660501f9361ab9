//! The status of an attempt for other threads, and cancelling it.

use std::net::{Shutdown, TcpStream};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bascule_ipc::vm::{MigrationPhase, MigrationStatus};
use bascule_types::{AttemptId, Bytes};

/// One attempt, shared by its thread and the VM actor.
#[derive(Debug)]
pub struct MigrationControl {
    shared: Mutex<Shared>,
    cancelled: Condvar,
}

#[derive(Debug)]
struct Shared {
    status: MigrationStatus,
    started: Instant,
    entered: Instant,
    ended: bool,
    cancel: bool,
    /// The commit request is about to be sent or was: nothing is cancelled any more.
    committed_to: bool,
    stream: Option<TcpStream>,
}

impl MigrationControl {
    /// An attempt that begins now.
    #[must_use]
    pub fn new(attempt: AttemptId) -> Self {
        let now = Instant::now();
        Self {
            shared: Mutex::new(Shared {
                status: MigrationStatus {
                    attempt,
                    phase: MigrationPhase::Preparing,
                    rounds: 0,
                    bytes: Bytes(0),
                    remaining: Bytes(0),
                    downtime_ms_predicted: None,
                    downtime_ms: None,
                    total_ms: 0,
                    timings: Vec::new(),
                    failure: None,
                },
                started: now,
                entered: now,
                ended: false,
                cancel: false,
                committed_to: false,
                stream: None,
            }),
            cancelled: Condvar::new(),
        }
    }

    /// The progress or the outcome.
    #[must_use]
    pub fn status(&self) -> MigrationStatus {
        let shared = self.lock();
        let mut status = shared.status.clone();
        if !shared.ended {
            status.total_ms = millis(shared.started.elapsed());
        }
        status
    }

    /// Cancels the attempt, and returns whether that was still possible. The guest then runs on at the
    /// source.
    pub fn cancel(&self) -> bool {
        let mut shared = self.lock();
        if shared.committed_to || shared.ended {
            return false;
        }
        shared.cancel = true;
        if let Some(stream) = &shared.stream
            && let Err(error) = stream.shutdown(Shutdown::Both)
        {
            tracing::debug!(%error, "the stream was already down");
        }
        drop(shared);
        self.cancelled.notify_all();
        true
    }

    /// Whether it was cancelled.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.lock().cancel
    }

    /// Whether it is over.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.lock().ended
    }

    /// Ends the attempt as failed, unless it has ended.
    pub fn fail(&self, failure: String) {
        if !self.has_ended() {
            self.end(MigrationPhase::Failed, Some(failure));
        }
    }

    /// Makes the attempt uncancellable; `false` when it was cancelled before.
    pub(super) fn pass_commit_point(&self) -> bool {
        let mut shared = self.lock();
        shared.committed_to = !shared.cancel;
        shared.committed_to
    }

    /// Waits for `time`, or until the attempt is cancelled.
    pub(super) fn wait(&self, time: Duration) {
        if time.is_zero() {
            return;
        }
        let shared = self.lock();
        let waited = self
            .cancelled
            .wait_timeout_while(shared, time, |shared| !shared.cancel);
        drop(waited);
    }

    pub(super) fn set_stream(&self, stream: Option<TcpStream>) {
        self.lock().stream = stream;
    }

    pub(super) fn enter(&self, phase: MigrationPhase) {
        let mut shared = self.lock();
        shared.leave_phase();
        shared.status.phase = phase;
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut MigrationStatus)) {
        change(&mut self.lock().status);
    }

    /// Ends the attempt in `phase`.
    pub(super) fn end(&self, phase: MigrationPhase, failure: Option<String>) {
        let mut shared = self.lock();
        shared.leave_phase();
        shared.status.phase = phase;
        shared.status.failure = failure;
        shared.status.total_ms = millis(shared.started.elapsed());
        shared.ended = true;
        shared.stream = None;
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // The status is consistent after every assignment.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn leave_phase(&mut self) {
        let now = Instant::now();
        let took = millis(now - self.entered);
        self.status.timings.push((self.status.phase, took));
        self.entered = now;
    }
}

/// Whole milliseconds, rounded up, so that a measured time is never shown as zero.
pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}
