//! Polling for a condition with a deadline.

use std::error::Error;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// A permanent error: [`wait_for`] returns at once when its probe fails with it.
#[derive(Debug)]
pub struct PermanentError(pub String);

impl fmt::Display for PermanentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for PermanentError {}

/// Calls `probe` until it succeeds. Its errors mean "not yet"; after `deadline` the last one is returned.
///
/// # Errors
/// When the deadline passes (with `what`, the time waited and the last error), or at once when the probe fails with
/// [`PermanentError`].
pub fn wait_for<T>(
    what: &str,
    deadline: Duration,
    mut probe: impl FnMut() -> Result<T>,
) -> Result<T> {
    let started = Instant::now();
    let mut pause = PAUSE_MIN;
    loop {
        let error = match probe() {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if error.downcast_ref::<PermanentError>().is_some() {
            return Err(error.context(format!("waited for {what}")));
        }
        let waited = started.elapsed();
        if waited >= deadline {
            return Err(anyhow!(
                "waited {:.1} s in vain for {what}: {error:#}",
                waited.as_secs_f64()
            ));
        }
        std::thread::sleep(pause.min(deadline.saturating_sub(waited)));
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// First pause between two probes: local conditions come true within milliseconds.
const PAUSE_MIN: Duration = Duration::from_millis(20);
/// Longest pause: a probe may be a kubectl call, 50 ms of a core each.
const PAUSE_MAX: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use anyhow::{bail, ensure};

    use super::*;

    #[test]
    fn the_value_of_the_first_success_is_returned() {
        let mut probes = 0;
        let value = wait_for("three probes", Duration::from_secs(5), || {
            probes += 1;
            ensure!(probes == 3, "only {probes}");
            Ok(probes)
        });
        assert_eq!(value.unwrap(), 3);
    }

    #[test]
    fn the_error_of_a_missed_deadline_names_the_condition_and_the_last_cause() {
        let error = wait_for("the moon", Duration::ZERO, || -> Result<()> {
            bail!("clouds")
        });
        let text = error.unwrap_err().to_string();
        assert!(
            text.contains("the moon") && text.contains("clouds"),
            "{text}"
        );
    }

    #[test]
    fn a_permanent_error_ends_the_wait_at_once() {
        let mut probes = 0;
        let result = wait_for(
            "a dead process",
            Duration::from_secs(60),
            || -> Result<()> {
                probes += 1;
                Err(PermanentError("it exited".into()).into())
            },
        );
        assert!(format!("{:#}", result.unwrap_err()).contains("it exited"));
        assert_eq!(probes, 1);
    }
}
