//! How long a guest waits before its next reset: not at all, unless it resets itself again and again.

use std::time::{Duration, Instant};

use bascule_ipc::vm::ResetCause;

/// A guest that runs for this long after a reset is not in a loop: longer than a boot takes.
const LOOP_TIME: Duration = Duration::from_secs(60);
/// Resets in a loop that are done at once: what an installation or a kernel upgrade may need.
pub(super) const FREE_RESETS: u32 = 5;
/// The wait before the next reset, doubled with each further one.
const WAIT_MIN: Duration = Duration::from_secs(1);
const WAIT_MAX: Duration = Duration::from_secs(60);

/// The resets of one guest, and how long it waits before the next.
#[derive(Debug)]
pub(super) struct Resets {
    /// All of them, also those on the nodes from which the guest has come.
    pub(super) count: u32,
    pub(super) last: Option<ResetCause>,
    /// When the guest was started, or last reset.
    began: Instant,
    /// Resets in a row, each within [`LOOP_TIME`] of the one before.
    in_a_row: u32,
}

impl Resets {
    /// Of a guest that starts at `now`.
    pub(super) const fn new(now: Instant) -> Self {
        Self {
            count: 0,
            last: None,
            began: now,
            in_a_row: 0,
        }
    }

    /// The guest begins to run at `now`, after its start or a reset.
    pub(super) const fn begin(&mut self, now: Instant) {
        self.began = now;
    }

    /// One more reset is due at `now`: how long it has to wait. A requested one never waits, and ends a loop.
    pub(super) fn due(&mut self, cause: ResetCause, now: Instant) -> Duration {
        self.last = Some(cause);
        let in_loop = now.saturating_duration_since(self.began) < LOOP_TIME;
        self.in_a_row = match cause {
            ResetCause::Requested => 0,
            _ if in_loop => self.in_a_row.saturating_add(1),
            _ => 1,
        };
        match self.in_a_row.checked_sub(FREE_RESETS + 1) {
            None => Duration::ZERO,
            Some(beyond) => {
                let factor = 1_u32.checked_shl(beyond).unwrap_or(u32::MAX);
                WAIT_MIN.saturating_mul(factor).min(WAIT_MAX)
            }
        }
    }

    /// For how long the machine waits and why, for people: "it waits for ...".
    pub(super) fn waits(&self, wait: Duration) -> String {
        let cause = self.last.map_or("", ResetCause::text);
        let (times, within, wait) = (self.in_a_row, LOOP_TIME.as_secs(), wait.as_secs());
        format!(
            "{wait} s before its next reset: {cause}, {times} times in a row within {within} s each"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_guest_in_a_loop_of_resets_waits_longer_and_longer_up_to_a_limit() {
        let start = Instant::now();
        let mut resets = Resets::new(start);
        let mut now = start;
        let mut waits = Vec::new();
        for _ in 0..14 {
            now += secs(2);
            waits.push(resets.due(ResetCause::Guest, now).as_secs());
            resets.begin(now);
        }
        assert_eq!(waits, [0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60]);
        let text = resets.waits(secs(60));
        assert_eq!(
            text,
            "60 s before its next reset: the guest has reset itself, 14 times in a row within 60 s each"
        );
        // It ran for long enough: the loop is over.
        assert_eq!(
            resets.due(ResetCause::TripleFault, now + LOOP_TIME),
            secs(0)
        );
        resets.in_a_row = u32::MAX;
        assert_eq!(resets.due(ResetCause::Guest, now), WAIT_MAX);
        assert_eq!(resets.due(ResetCause::Requested, now), secs(0));
        assert_eq!(resets.due(ResetCause::Guest, now), secs(0));
    }
}
