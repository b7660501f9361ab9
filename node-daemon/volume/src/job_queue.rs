//! The queue of requests for the coordinator of this process.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::peer_rpc::{PeerRequest, PeerResponse};

/// A bounded queue, which requesters and the coordinator thread share. Whoever changes it, or a reply in
/// it, tells the waiting threads by [`crate::volume_context::VolumeContext::announce`].
#[derive(Clone, Debug, Default)]
pub struct JobQueue(Arc<Mutex<Jobs>>);

#[derive(Debug, Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    /// The term has ended: nobody answers a request any more.
    closed: bool,
}

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
    /// Adds a request and returns where its answer will be; none if the queue is full or closed.
    #[must_use]
    pub fn push(&self, request: PeerRequest) -> Option<Reply> {
        let mut jobs = self.lock();
        let has_room = !jobs.closed && jobs.waiting.len() < JOBS_MAX;
        has_room.then(|| {
            let reply = Reply::default();
            jobs.waiting.push_back(Job {
                request,
                reply: reply.clone(),
            });
            reply
        })
    }

    /// The oldest request.
    #[must_use]
    pub fn pop(&self) -> Option<Job> {
        self.lock().waiting.pop_front()
    }

    /// Whether no request waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lock().waiting.is_empty()
    }

    /// Drops the requests that wait, and takes no more: a requester may have found the queue before the
    /// term ended.
    pub fn close(&self) {
        let mut jobs = self.lock();
        jobs.closed = true;
        jobs.waiting.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Jobs> {
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

#[cfg(test)]
mod tests {
    use bascule_types::{NodeUid, VolumeId};

    use super::*;
    use crate::peer_rpc::PeerOperation;

    fn request() -> PeerRequest {
        PeerRequest {
            volume: VolumeId::from_bytes([1; 16]),
            node: NodeUid::from_bytes([2; 16]),
            owner: None,
            boot: [3; 16],
            operation: PeerOperation::Rows,
        }
    }

    #[test]
    fn a_request_is_answered_or_dropped_and_its_requester_notices() {
        let queue = JobQueue::default();
        let (answered, dropped) = (
            queue.push(request()).unwrap(),
            queue.push(request()).unwrap(),
        );
        assert!(!answered.is_over());
        queue.pop().unwrap().answer(PeerResponse::WrongVolume);
        assert!(answered.is_over());
        assert_eq!(answered.take(), Some(PeerResponse::WrongVolume));
        drop(queue.pop());
        assert!(dropped.is_over());
        assert_eq!(dropped.take(), None);
    }

    /// Regression: a request that came after the end of the term waited for an answer until its time-out.
    #[test]
    fn the_end_of_a_term_ends_every_request_and_refuses_later_ones() {
        let queue = JobQueue::default();
        let found_earlier = queue.clone();
        let waiting = queue.push(request()).unwrap();
        queue.close();
        assert!(waiting.is_over() && waiting.take().is_none());
        assert!(found_earlier.push(request()).is_none());
    }

    #[test]
    fn a_full_queue_takes_no_more() {
        let queue = JobQueue::default();
        let replies: Vec<Option<Reply>> = (0..JOBS_MAX).map(|_| queue.push(request())).collect();
        assert!(replies.iter().all(Option::is_some));
        assert!(queue.push(request()).is_none());
    }
}
