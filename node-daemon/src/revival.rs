//! When a volume's process that has ended is started again: at once, so that the lease is kept; but
//! one that keeps ending must not be started for ever twice a second.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The volumes whose processes were started again lately.
#[derive(Debug, Default)]
pub(crate) struct Revivals(BTreeMap<String, Revival>);

#[derive(Clone, Copy, Debug)]
struct Revival {
    at: Instant,
    /// How long the next one waits.
    pause: Duration,
}

impl Revivals {
    /// Whether a volume whose process is found ended is due; if so, it counts as started.
    pub(crate) fn is_due(&mut self, volume: &str, now: Instant) -> bool {
        self.0
            .retain(|_, revival| now.duration_since(revival.at) < STEADY);
        let pause = match self.0.get(volume) {
            None => PAUSE_FIRST,
            Some(last) if now.duration_since(last.at) < last.pause => return false,
            Some(last) => (last.pause * 2).min(PAUSE_MAX),
        };
        self.0.insert(volume.to_owned(), Revival { at: now, pause });
        true
    }
}

/// Two tries fit into a lease of 4 s.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// A process that has lived this long has not ended at once.
const STEADY: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_keeps_ending_is_started_ever_more_rarely_and_others_at_once() {
        let begin = Instant::now();
        let mut revivals = Revivals::default();
        let due: Vec<u64> = (0..200)
            .filter(|second| revivals.is_due("bad", begin + Duration::from_secs(*second)))
            .collect();
        assert_eq!(due, [0, 1, 3, 7, 15, 31, 61, 91, 121, 151, 181]);
        let later = begin + Duration::from_secs(200);
        assert!(revivals.is_due("good", later));
        assert!(!revivals.is_due("bad", later));
        assert!(revivals.is_due("bad", later + STEADY), "it had lived");
        assert!(revivals.0.len() <= 2);
    }
}
