//! The queue of requests for the coordinator of this process.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::peer_rpc::{PeerRequest, PeerResponse};

/// A bounded queue, which requesters and the coordinator thread share. Whoever changes it, or a reply in
/// it, tells the waiting threads by [`crate::volume_context::VolumeContext::announce`].
#[derive(Clone, Debug, Default)]
pub struct JobQueue(Arc<Mutex<VecDeque<Job>>>);

/// A request for the coordinator of this process.
#[derive(Debug)]
pub struct Job {
    /// The request.
    pub request: PeerRequest,
    reply: Reply,
}

/// The answer to a job, shared by the requester and the coordinator thread.
#[derive(Clone, Debug, Default)]
pub struct Reply(Arc<Mutex<Option<PeerResponse>>>);

impl JobQueue {
    /// Adds a request and returns where its answer will be; none if the queue is full.
    #[must_use]
    pub fn push(&self, request: PeerRequest) -> Option<Reply> {
        let mut jobs = self.lock();
        (jobs.len() < JOBS_MAX).then(|| {
            let reply = Reply::default();
            jobs.push_back(Job {
                request,
                reply: reply.clone(),
            });
            reply
        })
    }

    /// The oldest request.
    #[must_use]
    pub fn pop(&self) -> Option<Job> {
        self.lock().pop_front()
    }

    /// Whether no request waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Drops the requests that wait.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Job>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Job {
    /// Answers. A job that is dropped without an answer has an unknown outcome.
    pub fn answer(self, response: PeerResponse) {
        *self.reply.lock() = Some(response);
    }
}

impl Reply {
    /// The answer, once there is one.
    #[must_use]
    pub fn take(&self) -> Option<PeerResponse> {
        self.lock().take()
    }

    /// Whether there is an answer, or the job was dropped without one.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.lock().is_some() || Arc::strong_count(&self.0) == 1
    }

    fn lock(&self) -> MutexGuard<'_, Option<PeerResponse>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Queued requests; a requester that finds the queue full retries.
const JOBS_MAX: usize = 256;
