//! Waiting on a condition, with a deadline, and saying what for.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Asks again and again until there is an answer.
///
/// # Errors
/// What was waited for, when it did not come within `limit`; or the condition's own error.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("{what}: did not happen within {limit:?}");
        }
        std::thread::sleep(POLL_PERIOD);
    }
}

/// Short beside everything that is waited for, long beside what a look costs.
const POLL_PERIOD: Duration = Duration::from_millis(5);
