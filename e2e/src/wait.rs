//! Polling for a condition with a deadline.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Calls `condition` until it returns a value.
///
/// # Errors
/// When `limit` passes (with `what`), or the condition's own error.
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

/// Poll interval: short compared with all conditions, long compared with the cost of a probe.
const POLL_PERIOD: Duration = Duration::from_millis(5);
