//! Progress on standard error: what is being done, how far it is, how long it takes. Standard output is for results.
//!
//! ```text
//!   [6/11] starting the cluster (usually 2 min) ...
//!     starting the control plane ...
//!     starting the control plane: done in 3.4 s
//!     starting 3 nodes ...
//!     starting 3 nodes: 30 s so far
//!     starting 3 nodes: done in 66.2 s
//!   [6/11] starting the cluster: done in 75.0 s
//! ```
//! A step that runs long prints a line every [`TICK`], so that neither a person nor a log watcher takes it for hung.
//! `e2e/step.sh` prints the same lines for the steps of `make` before this program exists.

use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// Prints `what` before `body` runs, the elapsed time every [`TICK`] and at the end; an error names the step.
///
/// `what` may end in a parenthesis with the usual time, which only the first line repeats.
pub fn step<T>(what: &str, body: impl FnOnce() -> Result<T>) -> Result<T> {
    say(&format!("{what} ..."));
    let short = without_hint(what);
    let ticker = Ticker::start(short);
    let value = body().with_context(|| short.to_owned())?;
    let took = ticker.stop();
    say(&format!("{short}: done in {}", elapsed(took)));
    Ok(value)
}

/// One line of progress on standard error, indented below the steps that are under way.
pub fn say(line: &str) {
    let depth = DEPTH.load(Ordering::Relaxed);
    eprintln!("{:indent$}{line}", "", indent = 2 * depth);
}

/// Numbered steps: `[5/11] starting a virtual machine ...`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Steps {
    next: u32,
    total: u32,
}

impl Steps {
    /// `total` steps, numbered from 1.
    pub fn new(total: u32) -> Self {
        Self { next: 1, total }
    }

    /// [`step`] with the next number.
    pub fn step<T>(&mut self, what: &str, body: impl FnOnce() -> Result<T>) -> Result<T> {
        let number = self.next;
        self.next += 1;
        step(&format!("[{number}/{}] {what}", self.total), body)
    }
}

/// `5/11`: the number of the next step, and how many there are with those that another program has done.
impl FromStr for Steps {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (next, total) = text.split_once('/').context("write NEXT/TOTAL")?;
        let number = |text: &str| text.parse().with_context(|| format!("{text:?}"));
        let (next, total) = (number(next)?, number(total)?);
        ensure!((1..=total).contains(&next), "{next} is not in 1..={total}");
        Ok(Self { next, total })
    }
}

/// Prints the elapsed time of a step until it is stopped or dropped (the step failed).
struct Ticker {
    started: Instant,
    /// The thread ends when this is dropped.
    _end_tx: mpsc::Sender<()>,
}

impl Ticker {
    fn start(what: &str) -> Self {
        let started = Instant::now();
        let depth = DEPTH.fetch_add(1, Ordering::Relaxed);
        let (end_tx, end_rx) = mpsc::channel::<()>();
        let what = what.to_owned();
        let tick = move || {
            while end_rx.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                // A step within this one prints lines of its own.
                if DEPTH.load(Ordering::Relaxed) == depth + 1 {
                    let so_far = elapsed(started.elapsed());
                    eprintln!("{:indent$}{what}: {so_far} so far", "", indent = 2 * depth);
                }
            }
        };
        // Without a thread the step runs all the same, without these lines.
        drop(thread::Builder::new().name("progress".into()).spawn(tick));
        Self {
            started,
            _end_tx: end_tx,
        }
    }

    fn stop(self) -> Duration {
        self.started.elapsed()
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        DEPTH.fetch_sub(1, Ordering::Relaxed);
    }
}

/// `what` without the usual time in parentheses at its end.
fn without_hint(what: &str) -> &str {
    match what.rsplit_once(" (") {
        Some((short, hint)) if hint.ends_with(')') => short,
        _ => what,
    }
}

/// `3.4 s`, or `12 min 5 s` from 100 s on.
fn elapsed(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds < 100 {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        format!("{} min {} s", seconds / 60, seconds % 60)
    }
}

/// Number of steps that are under way, one within the other.
static DEPTH: AtomicUsize = AtomicUsize::new(0);
/// Interval of the lines of a step that runs long: log watchers commonly take a minute without output for a hang.
pub const TICK: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn an_error_names_the_step_without_its_usual_time() {
        let failed: Result<()> = step("building etcd (usually 5 min)", || bail!("no network"));
        assert_eq!(
            format!("{:#}", failed.unwrap_err()),
            "building etcd: no network"
        );
    }

    #[test]
    fn steps_continue_the_numbers_of_another_program() {
        let mut steps: Steps = "5/6".parse().unwrap();
        let first: Result<()> = steps.step("one", || bail!("x"));
        assert_eq!(format!("{:#}", first.unwrap_err()), "[5/6] one: x");
        steps.step("two", || Ok(())).unwrap();
        assert_eq!(steps, Steps { next: 7, total: 6 });
        for bad in ["", "5", "0/3", "4/3", "a/b"] {
            assert!(bad.parse::<Steps>().is_err(), "{bad}");
        }
    }

    #[test]
    fn long_times_are_in_minutes() {
        assert_eq!(elapsed(Duration::from_millis(3440)), "3.4 s");
        assert_eq!(elapsed(Duration::from_secs(725)), "12 min 5 s");
    }
}
