//! The guest's serial console: ticks, acknowledged block numbers, detected faults.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::wait_for;

/// One tick, as it arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    /// When the line arrived.
    pub at: Instant,
    /// Its number, from 1 at boot.
    pub number: u64,
    /// The guest's own clock.
    pub guest: Duration,
}

/// Follows one guest's console over all its streams: one per process the guest ran in, for example
/// the source and the destination of a migration.
#[derive(Clone, Debug, Default)]
pub struct Console {
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    streams: usize,
    /// Each line with the index of its stream. Each stream has its own reader thread, so only the
    /// order within one stream is meaningful.
    ticks: Vec<(usize, Tick)>,
    lines: Vec<String>,
    findings: Vec<String>,
    disk_ack: u64,
    /// Boots that are to come by a reset of the machine.
    resets: u32,
}

impl Console {
    /// A console without streams; see [`Self::follow`].
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Follows `stream` until it ends.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn follow(&self, stream: impl Read + Send + 'static) -> Result<()> {
        let seen = Arc::clone(&self.seen);
        let number = self.seen().add_stream();
        let mut reader = BufReader::new(stream);
        let follow = move || {
            let mut line = Vec::new();
            // A stream that fails has ended: its guest is gone.
            while reader
                .read_until(b'\n', &mut line)
                .is_ok_and(|length| length > 0)
            {
                let at = Instant::now();
                // A line without an end was cut by a migration: its other half is on the
                // destination's console.
                if line.last() != Some(&b'\n') {
                    break;
                }
                let text = String::from_utf8_lossy(&line);
                seen.lock().unwrap_or_else(PoisonError::into_inner).take(
                    number,
                    at,
                    text.trim_end(),
                );
                line.clear();
            }
        };
        let builder = std::thread::Builder::new().name("console".into());
        builder.spawn(follow).context("start a thread")?;
        Ok(())
    }

    /// The guest's machine is about to be reset: with the next boot its ticks begin anew.
    pub fn expect_reset(&self) {
        self.seen().resets += 1;
    }

    /// The ticks that have arrived, in the guest's order.
    #[must_use]
    pub fn ticks(&self) -> Vec<Tick> {
        self.seen().in_order().map(|(_, tick)| tick).collect()
    }

    /// The lines that have arrived, ticks left out.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.seen().lines.clone()
    }

    /// The highest block number that the guest said was acknowledged by its disk.
    #[must_use]
    pub fn disk_ack(&self) -> u64 {
        self.seen().disk_ack
    }

    /// Waits for a line that starts with `start`.
    ///
    /// # Errors
    /// When it does not come; the error shows what came.
    pub fn wait_line(&self, start: &str, limit: Duration) -> Result<String> {
        let what = format!("a console line that starts with {start:?}");
        wait_for(&what, limit, || {
            let seen = self.seen();
            Ok(seen
                .lines
                .iter()
                .find(|line| line.starts_with(start))
                .cloned())
        })
        .with_context(|| format!("console so far: {:?}", self.lines()))
    }

    /// Waits for `count` ticks after now.
    ///
    /// # Errors
    /// When they do not come.
    pub fn wait_ticks(&self, count: usize, limit: Duration) -> Result<()> {
        let wanted = self.seen().ticks.len() + count;
        wait_for(&format!("{count} ticks"), limit, || {
            Ok((self.seen().ticks.len() >= wanted).then_some(()))
        })
        .with_context(|| format!("console so far: {:?}", self.lines()))
    }

    /// The longest time between two ticks in a row of which the later arrived after `since`.
    #[must_use]
    pub fn gap_max(&self, since: Instant) -> Duration {
        let ticks = self.ticks();
        let gaps = ticks.windows(2).filter(|pair| pair[1].at >= since);
        gaps.map(|pair| pair[1].at.duration_since(pair[0].at))
            .max()
            .unwrap_or_default()
    }

    /// Checks that the guest reported no fault and never ran twice: ticks and clock are strictly
    /// increasing, and the ticks of each process are contiguous. A guest that ran in two places, or
    /// was rolled back, repeats a tick.
    ///
    /// # Errors
    /// The first violation found in the console's lines.
    pub fn check(&self) -> Result<()> {
        let seen = self.seen();
        ensure!(
            seen.findings.is_empty(),
            "the guest found: {:?}",
            seen.findings
        );
        for stream in 0..seen.streams {
            let own = seen.ticks.iter().filter(|(number, _)| *number == stream);
            let own: Vec<Tick> = own.map(|(_, tick)| *tick).collect();
            rises(&own)?;
        }
        let in_order: Vec<_> = seen.in_order().collect();
        let ticks: Vec<Tick> = in_order.iter().map(|(_, tick)| *tick).collect();
        rises(&ticks)?;
        let mut left = BTreeSet::new();
        for pair in in_order.windows(2) {
            let (before, after) = (pair[0].0, pair[1].0);
            if before != after {
                left.insert(before);
            }
            ensure!(
                !left.contains(&after),
                "the guest ran in two places: {:?} is of a console that it had left",
                pair[1].1
            );
        }
        Ok(())
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// That ticks and clock rise from each tick to the next.
fn rises(ticks: &[Tick]) -> Result<()> {
    for pair in ticks.windows(2) {
        ensure!(
            pair[1].number > pair[0].number && pair[1].guest > pair[0].guest,
            "the guest went back in time: {:?} came after {:?}",
            pair[1],
            pair[0],
        );
    }
    Ok(())
}

impl Seen {
    fn add_stream(&mut self) -> usize {
        self.streams += 1;
        self.streams - 1
    }

    /// The ticks by their number, each with its stream.
    fn in_order(&self) -> impl Iterator<Item = (usize, Tick)> + use<> {
        let mut ticks = self.ticks.clone();
        ticks.sort_by_key(|(_, tick)| tick.number);
        ticks.into_iter()
    }

    fn take(&mut self, stream: usize, at: Instant, line: &str) {
        let mut words = line.split_ascii_whitespace();
        if words.next() == Some("t") {
            let mut number = || words.next().and_then(|word| word.parse::<u64>().ok());
            if let (Some(number), Some(guest_us)) = (number(), number()) {
                let guest = Duration::from_micros(guest_us);
                self.ticks.push((stream, Tick { at, number, guest }));
                if words.next() == Some("a") {
                    let ack = words.next().and_then(|word| word.parse().ok());
                    self.disk_ack = self.disk_ack.max(ack.unwrap_or(0));
                }
            }
            return;
        }
        if line.starts_with("probe boot=") && self.resets > 0 {
            self.resets -= 1;
            self.ticks.clear();
        }
        if line.starts_with("bad:") {
            self.findings.push(line.to_owned());
        }
        self.lines.push(line.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen_after(text: &'static str) -> Console {
        arrived(&[(0, text)])
    }

    /// What came by which stream, in the order of arrival.
    fn arrived(pieces: &[(usize, &str)]) -> Console {
        let console = Console::new();
        let mut seen = console.seen();
        for (stream, text) in pieces {
            seen.streams = seen.streams.max(stream + 1);
            for line in text.lines() {
                seen.take(*stream, Instant::now(), line);
            }
        }
        drop(seen);
        console
    }

    #[test]
    fn ticks_begin_anew_with_an_expected_boot_only() {
        let again = "t 1 1000\nt 2 2000\nprobe boot=2\nt 1 1000";
        assert!(seen_after(again).check().is_err());
        let console = Console::new();
        console.expect_reset();
        let mut seen = console.seen();
        seen.streams = 1;
        for line in again.lines() {
            seen.take(0, Instant::now(), line);
        }
        drop(seen);
        console.check().unwrap();
        assert_eq!(console.ticks().len(), 1);
    }

    /// On a busy machine the source's last lines may be read after the destination's first. Migration
    /// tests used to fail because of that.
    #[test]
    fn lines_of_the_source_may_arrive_after_lines_of_the_destination() {
        let late = arrived(&[
            (0, "t 1 1000"),
            (1, "t 4 4000\nt 5 5000"),
            (0, "t 2 2000\nt 3 3000"),
        ]);
        late.check().unwrap();
        let numbers: Vec<u64> = late.ticks().iter().map(|tick| tick.number).collect();
        assert_eq!(numbers, [1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_guest_that_runs_in_two_places_or_was_rolled_back_is_noticed_whatever_arrives_first() {
        for bad in [
            [
                (0, "t 1 1000\nt 2 2000\nt 3 3000"),
                (1, "t 3 3000\nt 4 4000"),
            ],
            [
                (1, "t 3 3000\nt 4 4000"),
                (0, "t 1 1000\nt 2 2000\nt 3 2900"),
            ],
            [(0, "t 1 1000\nt 2 9000"), (1, "t 3 3000\nt 4 4000")],
            [
                (0, "t 1 1000\nt 3 3000\nt 5 5000"),
                (1, "t 2 2000\nt 4 4000"),
            ],
        ] {
            assert!(arrived(&bad).check().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn ticks_acknowledgements_and_findings_are_distinguished() {
        let console = seen_after("probe boot=1\nt 1 1000\nt 2 2000 a 17\nt 3 3000");
        assert_eq!(console.ticks().len(), 3);
        assert_eq!((console.disk_ack(), console.lines().len()), (17, 1));
        console.check().unwrap();
        let console = seen_after("t 1 1000\nbad: page 7");
        assert!(console.check().unwrap_err().to_string().contains("page 7"));
    }

    #[test]
    fn a_repeated_tick_and_a_clock_that_steps_back_are_noticed() {
        assert!(seen_after("t 1 1000\nt 2 2000\nt 2 2500").check().is_err());
        assert!(seen_after("t 1 1000\nt 2 900").check().is_err());
    }
}
