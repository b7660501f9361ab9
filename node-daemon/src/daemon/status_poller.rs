//! Polls many processes concurrently, so that a process that does not respond delays no other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

/// Polls a set of processes again and again, and keeps the last answer of each. At most one request
/// per process is outstanding, in a thread of its own that ends with the answer.
#[derive(Debug)]
pub(crate) struct StatusPoller<K, A> {
    polled: BTreeMap<K, Polled<A>>,
    /// How long one round waits for answers, over all processes.
    round_limit: Duration,
    /// How old the last answer of a slow process may be to be used again.
    max_age: Duration,
}

#[derive(Debug)]
struct Polled<A> {
    pending: Option<Pending<A>>,
    last: Option<(A, Instant)>,
}

/// The outstanding request of one process.
type Pending<A> = Receiver<A>;

impl<K, A> StatusPoller<K, A>
where
    K: Ord + Clone + Send + 'static,
    A: Clone + Send + 'static,
{
    pub(crate) const fn new(round_limit: Duration, max_age: Duration) -> Self {
        Self {
            polled: BTreeMap::new(),
            round_limit,
            max_age,
        }
    }

    /// The answers of the processes in `keys`. A process that takes longer than a round gets its last
    /// answer, or `None` when that is older than `max_age`. Processes that are not in `keys` are
    /// dropped.
    pub(crate) fn poll(
        &mut self,
        keys: &BTreeSet<K>,
        request: impl Fn(&K) -> A + Send + Sync + 'static,
    ) -> BTreeMap<K, Option<A>> {
        self.polled.retain(|key, _| keys.contains(key));
        let request = Arc::new(request);
        for key in keys {
            let polled = self.polled.entry(key.clone()).or_default();
            if polled.pending.is_none() {
                let (key, request) = (key.clone(), Arc::clone(&request));
                polled.pending = spawn_request(move || request(&key));
            }
        }
        let deadline = Instant::now() + self.round_limit;
        let answers = self.polled.iter_mut().map(|(key, polled)| {
            polled.receive(deadline);
            (key.clone(), polled.answer(self.max_age))
        });
        answers.collect()
    }
}

impl<A: Clone> Polled<A> {
    fn receive(&mut self, deadline: Instant) {
        let Some(pending) = &self.pending else { return };
        match pending.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(answer) => self.last = Some((answer, Instant::now())),
            Err(RecvTimeoutError::Timeout) => return,
            Err(RecvTimeoutError::Disconnected) => {}
        }
        self.pending = None;
    }

    fn answer(&self, max_age: Duration) -> Option<A> {
        let (answer, at) = self.last.as_ref()?;
        (at.elapsed() <= max_age).then(|| answer.clone())
    }
}

impl<A> Default for Polled<A> {
    fn default() -> Self {
        Self {
            pending: None,
            last: None,
        }
    }
}

/// `None` when no thread can be started; the next round tries again.
fn spawn_request<A: Send + 'static>(
    request: impl FnOnce() -> A + Send + 'static,
) -> Option<Pending<A>> {
    let (answer_tx, answer_rx) = sync_channel(1);
    let spawned = std::thread::Builder::new()
        .name("status-poll".to_owned())
        // The receiver is gone when the process was dropped from the set meanwhile.
        .spawn(move || drop(answer_tx.send(request())));
    match spawned {
        Ok(_) => Some(answer_rx),
        Err(error) => {
            tracing::warn!(%error, "cannot start a status poll thread");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Condvar, Mutex};

    use super::*;

    /// Two VM processes that hung delayed every report of their node beyond the operator's limit, so
    /// the operator treated the node as unreachable, with all its other guests.
    #[test]
    fn a_process_that_hangs_delays_no_other_and_gets_one_request_only() {
        let open = Arc::new((Mutex::new(false), Condvar::new()));
        let requests_to_stuck = Arc::new(Mutex::new(0));
        let request = || {
            let (open, count) = (Arc::clone(&open), Arc::clone(&requests_to_stuck));
            move |key: &&'static str| {
                if *key == "stuck" {
                    *count.lock().unwrap() += 1;
                    let (opened, bell) = &*open;
                    drop(bell.wait_while(opened.lock().unwrap(), |opened| !*opened));
                }
                key.len()
            }
        };
        let keys = BTreeSet::from(["stuck", "well", "a"]);
        let mut poller = StatusPoller::new(Duration::from_millis(10), Duration::MAX);
        let all_but_one = BTreeMap::from([("stuck", None), ("well", Some(4)), ("a", Some(1))]);
        while poller.poll(&keys, request()) != all_but_one {}
        assert_eq!(poller.poll(&keys, request()), all_but_one);
        assert_eq!(*requests_to_stuck.lock().unwrap(), 1);

        // Its answer is received once it responds, and used again when it hangs once more.
        *open.0.lock().unwrap() = true;
        open.1.notify_all();
        while poller.poll(&keys, request())["stuck"].is_none() {}
        *open.0.lock().unwrap() = false;
        assert_eq!(poller.poll(&keys, request())["stuck"], Some(5));
        poller.max_age = Duration::ZERO;
        assert_eq!(poller.poll(&keys, request())["stuck"], None);

        // Processes that are no longer in the set are dropped.
        poller.max_age = Duration::MAX;
        poller.poll(&BTreeSet::from(["well"]), request());
        assert_eq!(poller.polled.len(), 1);
        *open.0.lock().unwrap() = true;
        open.1.notify_all();
    }
}
