//! Waiting for a condition that another process brings about.

use std::time::{Duration, Instant};

/// Polls `condition` until it gives a value or `limit` has passed.
pub(crate) fn wait_for<T>(limit: Duration, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let begin = Instant::now();
    loop {
        if let Some(value) = condition() {
            return Some(value);
        }
        if begin.elapsed() >= limit {
            return None;
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Poll interval for conditions on other processes.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
