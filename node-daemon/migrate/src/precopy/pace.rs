//! The bandwidth cap: how long to wait before the next frame.

use std::time::Duration;

use bascule_types::Bytes;

use super::rate::Rate;

/// Spreads sent bytes over time. Reads no clock: points in time are durations since a fixed start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pacer {
    rate: Option<Rate>,
    free_at: Duration,
}

impl Pacer {
    /// A pacer for this cap, or one that never waits.
    #[must_use]
    pub const fn new(rate: Option<Rate>) -> Self {
        Self {
            rate,
            free_at: Duration::ZERO,
        }
    }

    /// Counts `sent` bytes at `now` and says how long to wait before sending more. Time in which
    /// nothing was sent is not saved up beyond 20 ms.
    pub fn sent(&mut self, sent: Bytes, now: Duration) -> Duration {
        let Some(rate) = self.rate else {
            return Duration::ZERO;
        };
        let start = self.free_at.max(now.saturating_sub(BURST));
        self.free_at = start.saturating_add(rate.time_for(sent));
        self.free_at.saturating_sub(now)
    }
}

/// How much unused time may be caught up.
const BURST: Duration = Duration::from_millis(20);
