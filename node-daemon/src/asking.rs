//! Asking many processes at once: one that does not answer keeps nobody waiting.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

/// Whom something is asked again and again, and what each said last. Each has one question out at
/// most, in a thread of its own that ends with the answer.
#[derive(Debug)]
pub(crate) struct Asker<K, A> {
    asked: BTreeMap<K, Asked<A>>,
    /// How long one round waits for answers.
    patience: Duration,
    /// How long the last answer of one that is slow stands for the next.
    memory: Duration,
}

#[derive(Debug)]
struct Asked<A> {
    pending: Option<Receiver<A>>,
    last: Option<(A, Instant)>,
}

impl<K, A> Asker<K, A>
where
    K: Ord + Clone + Send + 'static,
    A: Clone + Send + 'static,
{
    pub(crate) const fn new(patience: Duration, memory: Duration) -> Self {
        Self {
            asked: BTreeMap::new(),
            patience,
            memory,
        }
    }

    /// The answers of `keys`: of one that takes longer than a round its last one, and none once that
    /// is too old.
    pub(crate) fn ask(
        &mut self,
        keys: &BTreeSet<K>,
        question: impl Fn(&K) -> A + Send + Sync + 'static,
    ) -> BTreeMap<K, Option<A>> {
        self.asked.retain(|key, _| keys.contains(key));
        let question = Arc::new(question);
        for key in keys {
            let asked = self.asked.entry(key.clone()).or_default();
            if asked.pending.is_none() {
                let (key, question) = (key.clone(), Arc::clone(&question));
                asked.pending = in_a_thread(move || question(&key));
            }
        }
        let deadline = Instant::now() + self.patience;
        let answers = self.asked.iter_mut().map(|(key, asked)| {
            asked.hear(deadline);
            (key.clone(), asked.answer(self.memory))
        });
        answers.collect()
    }
}

impl<A: Clone> Asked<A> {
    fn hear(&mut self, deadline: Instant) {
        let Some(pending) = &self.pending else { return };
        match pending.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(answer) => self.last = Some((answer, Instant::now())),
            Err(RecvTimeoutError::Timeout) => return,
            Err(RecvTimeoutError::Disconnected) => {}
        }
        self.pending = None;
    }

    fn answer(&self, memory: Duration) -> Option<A> {
        let (answer, at) = self.last.as_ref()?;
        (at.elapsed() <= memory).then(|| answer.clone())
    }
}

impl<A> Default for Asked<A> {
    fn default() -> Self {
        Self {
            pending: None,
            last: None,
        }
    }
}

/// None when there can be no further thread: then it is asked in the next round.
fn in_a_thread<A: Send + 'static>(
    question: impl FnOnce() -> A + Send + 'static,
) -> Option<Receiver<A>> {
    let (answer_tx, answer_rx) = sync_channel(1);
    let spawned = std::thread::Builder::new()
        .name("ask".to_owned())
        // Nobody hears of one that was forgotten meanwhile.
        .spawn(move || drop(answer_tx.send(question())));
    match spawned {
        Ok(_) => Some(answer_rx),
        Err(error) => {
            tracing::warn!(%error, "no thread to ask in");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Condvar, Mutex};

    use super::*;

    /// Found by reading: two guests' processes that stood still made every report of their node later
    /// than the operator waits, and the node counted as silent with all its other guests.
    #[test]
    fn one_that_never_answers_keeps_nobody_waiting_and_is_asked_once() {
        let open = Arc::new((Mutex::new(false), Condvar::new()));
        let asked_of_stuck = Arc::new(Mutex::new(0));
        let question = || {
            let (open, count) = (Arc::clone(&open), Arc::clone(&asked_of_stuck));
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
        let mut asker = Asker::new(Duration::from_millis(10), Duration::MAX);
        let all_but_one = BTreeMap::from([("stuck", None), ("well", Some(4)), ("a", Some(1))]);
        while asker.ask(&keys, question()) != all_but_one {}
        assert_eq!(asker.ask(&keys, question()), all_but_one);
        assert_eq!(*asked_of_stuck.lock().unwrap(), 1);

        // It is heard once it answers, and remembered when it is stuck again.
        *open.0.lock().unwrap() = true;
        open.1.notify_all();
        while asker.ask(&keys, question())["stuck"].is_none() {}
        *open.0.lock().unwrap() = false;
        assert_eq!(asker.ask(&keys, question())["stuck"], Some(5));
        asker.memory = Duration::ZERO;
        assert_eq!(asker.ask(&keys, question())["stuck"], None);

        // Whoever is not asked for is forgotten.
        asker.memory = Duration::MAX;
        asker.ask(&BTreeSet::from(["well"]), question());
        assert_eq!(asker.asked.len(), 1);
        *open.0.lock().unwrap() = true;
        open.1.notify_all();
    }
}
