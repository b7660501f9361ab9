//! When a volume process, or the watchdog's, that has ended is started again: immediately the first time, so that the
//! lease does not lapse, then at growing intervals, so that a crash loop does not load the node.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The volumes whose processes were restarted within the last [`STABLE_AFTER`].
#[derive(Debug, Default)]
pub(crate) struct RestartBackoff(BTreeMap<String, Restart>);

#[derive(Clone, Copy, Debug)]
struct Restart {
    at: Instant,
    /// The interval before the next restart.
    pause: Duration,
}

impl RestartBackoff {
    /// Whether a volume process that has ended may be restarted now; if so, the restart is recorded.
    pub(crate) fn is_due(&mut self, volume: &str, now: Instant) -> bool {
        self.0
            .retain(|_, restart| now.duration_since(restart.at) < STABLE_AFTER);
        let pause = match self.0.get(volume) {
            None => PAUSE_FIRST,
            Some(last) if now.duration_since(last.at) < last.pause => return false,
            Some(last) => (last.pause * 2).min(PAUSE_MAX),
        };
        self.0.insert(volume.to_owned(), Restart { at: now, pause });
        true
    }
}

/// Allows two attempts within the default lease of 4 s.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// A process that has run this long since its restart starts again without a pause.
const STABLE_AFTER: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_in_a_crash_loop_is_restarted_at_growing_intervals_and_others_immediately() {
        let begin = Instant::now();
        let mut backoff = RestartBackoff::default();
        let due: Vec<u64> = (0..200)
            .filter(|second| backoff.is_due("bad", begin + Duration::from_secs(*second)))
            .collect();
        assert_eq!(due, [0, 1, 3, 7, 15, 31, 61, 91, 121, 151, 181]);
        let later = begin + Duration::from_secs(200);
        assert!(backoff.is_due("good", later));
        assert!(!backoff.is_due("bad", later));
        assert!(backoff.is_due("bad", later + STABLE_AFTER), "it was stable");
        assert!(backoff.0.len() <= 2);
    }
}
