//! The pre-copy controller: measures bandwidth, predicts the blackout, decides after each round.
//!
//! # States
//! ```text
//!  predicted blackout = fixed cost + remaining bytes / bandwidth
//!
//!             round ended ┌───────────────────────────────┐
//!                         ▼                               │
//!  predicted ≤ limit ── and polishing is not worth it ──► Stop
//!            │          └─ worth it ───────────────────► NextRound
//!  predicted > limit ── budget left, still improving ──► NextRound
//!                       └─ otherwise ──────────────────► DoesNotConverge (quick or fail)
//! ```
//!
//! A fixed cost that takes more than half of the limit is measured again, since one delay of a busy host
//! would otherwise rule the move out.
//!
//! All figures are integers: bytes, nanoseconds, bytes per second. Nothing here reads a clock.

use std::time::Duration;

use bascule_types::Bytes;

use crate::pages::{PAGE_BYTES, Pages};

mod pace;
mod rate;

#[cfg(test)]
mod tests;

pub use pace::Pacer;
pub use rate::Rate;

/// What the VM's policy allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest blackout (downtime) to aim at.
    pub downtime_max: Duration,
    /// Longest duration of pre-copy.
    pub time_max: Duration,
    /// Most rounds of pre-copy.
    pub rounds_max: u32,
    /// Bandwidth cap of pre-copy; none for as fast as the link.
    pub rate_max: Option<Rate>,
    /// What to do with a guest that writes faster than the link carries.
    pub fallback: Fallback,
}

/// What to do with a guest that does not converge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fallback {
    /// Save it to the volume and restore it on the destination.
    Quick,
    /// Fail the migration; the guest runs on at the source.
    Fail,
}

/// The part of the blackout that does not depend on how much is dirty. Every part is measured
/// before the guest is stopped; of several measurements the shortest counts, because a delay of the
/// host only ever makes one longer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FixedCost {
    /// Stopping, draining and saving: a dry run on the source.
    pub save: Duration,
    /// Restoring: a dry run on the destination.
    pub restore: Duration,
    /// The transfer on the volume: as long as a request to the coordinator takes.
    pub commit: Duration,
    /// One round trip; the blackout has two of them: `Ready`, and `Committed` to `Running`.
    pub round_trip: Duration,
    /// The device state that is sent.
    pub state: Bytes,
}

/// One finished round, acknowledged by the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Bytes sent, with headers.
    pub sent: Bytes,
    /// From the first byte to the acknowledgement.
    pub took: Duration,
    /// Time of that spent waiting for the bandwidth cap.
    pub paced: Duration,
    /// Pages that were dirty again at its end.
    pub dirty: Pages,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Copy what is dirty while the guest runs.
    NextRound,
    /// Stop the guest.
    Stop {
        /// The blackout to expect.
        predicted: Duration,
    },
    /// Give live migration up and fall back.
    DoesNotConverge {
        /// [`Limits::fallback`].
        fallback: Fallback,
        /// The blackout that there would have been.
        predicted: Duration,
        /// Which budget is used up.
        cause: Exhausted,
    },
}

/// Which budget of pre-copy is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Exhausted {
    /// [`Limits::time_max`].
    #[error("the time for pre-copy is used up")]
    Time,
    /// [`Limits::rounds_max`].
    #[error("the rounds for pre-copy are used up")]
    Rounds,
    /// The guest dirties memory as fast as it is sent, round after round.
    #[error("the guest writes as fast as memory is sent")]
    NoProgress,
}

/// Decides round by round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Controller {
    limits: Limits,
    rounds: u32,
    rate: Option<Rate>,
    best: Option<Duration>,
    stalled: u32,
    improved_at: Duration,
    polished: u32,
    dry_runs: u32,
}

impl FixedCost {
    /// Takes a further dry run's measurement of what the source measures, part by part.
    pub fn improve(&mut self, again: &Self) {
        self.save = self.save.min(again.save);
        self.commit = self.commit.min(again.commit);
        self.round_trip = self.round_trip.min(again.round_trip);
    }

    /// The blackout with nothing dirty, at this rate.
    #[must_use]
    pub fn total(&self, rate: Rate) -> Duration {
        self.save
            .saturating_add(self.restore)
            .saturating_add(self.commit)
            .saturating_add(self.round_trip.saturating_mul(2))
            .saturating_add(rate.time_for(self.state))
    }
}

impl Controller {
    /// A controller for one attempt.
    #[must_use]
    pub const fn new(limits: Limits) -> Self {
        Self {
            limits,
            rounds: 0,
            rate: None,
            best: None,
            stalled: 0,
            improved_at: Duration::ZERO,
            polished: 0,
            dry_runs: 0,
        }
    }

    /// Whether to measure the fixed cost in this round: in the first, and again while it takes more
    /// than half of the limit, which each measurement stops the guest for [`FixedCost::save`] to find out.
    #[must_use]
    pub fn begin_dry_run(&mut self, fixed: &FixedCost) -> bool {
        let dear = fixed.total(self.rate()) > self.limits.downtime_max / 2;
        let wanted = self.dry_runs == 0 || (dear && self.dry_runs < DRY_RUNS_MAX);
        self.dry_runs += u32::from(wanted);
        wanted
    }

    /// The bandwidth as estimated so far.
    #[must_use]
    pub fn rate(&self) -> Rate {
        self.rate.unwrap_or(RATE_GUESS)
    }

    /// The blackout if the guest were stopped with `dirty` pages to send.
    #[must_use]
    pub fn predict(&self, dirty: Pages, fixed: &FixedCost) -> Duration {
        let bytes = Bytes(dirty.0.saturating_mul(PAGE_BYTES + RUN_OVERHEAD_BYTES));
        fixed
            .total(self.rate())
            .saturating_add(self.rate().time_for(bytes))
    }

    /// Takes a finished round. `elapsed` counts from the start of the first.
    #[must_use]
    pub fn round_ended(&mut self, round: &Round, fixed: &FixedCost, elapsed: Duration) -> Decision {
        self.rounds = self.rounds.saturating_add(1);
        self.measure(round);
        let predicted = self.predict(round.dirty, fixed);
        let before = self.best.unwrap_or(Duration::MAX);
        self.best = Some(before.min(predicted));
        if predicted <= self.limits.downtime_max {
            return self.stop_or_polish(round.dirty, fixed, before, elapsed);
        }
        let improved = predicted < before - before / IMPROVEMENT_PART;
        if improved {
            self.improved_at = elapsed;
        }
        self.stalled = if improved { 0 } else { self.stalled + 1 };
        let stalled_for = elapsed.saturating_sub(self.improved_at);
        let exhausted = if self.stalled >= STALLED_ROUNDS_MAX && stalled_for >= STALLED_TIME_MIN {
            Some(Exhausted::NoProgress)
        } else {
            self.exhausted(elapsed)
        };
        exhausted.map_or(Decision::NextRound, |cause| Decision::DoesNotConverge {
            fallback: self.limits.fallback,
            predicted,
            cause,
        })
    }

    /// The limit is met. A few more rounds are worth it while they make the blackout much
    /// shorter: they cost the guest nothing and the link little.
    fn stop_or_polish(
        &mut self,
        dirty: Pages,
        fixed: &FixedCost,
        before: Duration,
        elapsed: Duration,
    ) -> Decision {
        let predicted = self.predict(dirty, fixed);
        let floor = fixed.total(self.rate());
        let memory = predicted.saturating_sub(floor);
        let worth_it = memory > floor.max(POLISH_FLOOR)
            && predicted < before - before / IMPROVEMENT_PART
            && self.polished < POLISH_ROUNDS_MAX
            && self.exhausted(elapsed).is_none();
        if worth_it {
            self.polished += 1;
            Decision::NextRound
        } else {
            Decision::Stop { predicted }
        }
    }

    fn exhausted(&self, elapsed: Duration) -> Option<Exhausted> {
        if elapsed >= self.limits.time_max {
            Some(Exhausted::Time)
        } else if self.rounds >= self.limits.rounds_max {
            Some(Exhausted::Rounds)
        } else {
            None
        }
    }

    /// Small rounds measure the round trip more than the bandwidth, and are left out. What the
    /// cap made us wait is no property of the link: the last pass is not capped.
    fn measure(&mut self, round: &Round) {
        if round.sent < SAMPLE_BYTES_MIN {
            return;
        }
        let sample = Rate::of(round.sent, round.took.saturating_sub(round.paced));
        self.rate = Some(match self.rate {
            // A rate that falls is believed at once, one that rises only half.
            Some(Rate(old)) if sample.0 > old => Rate(old + (sample.0 - old) / 2),
            _ => sample,
        });
    }
}

/// Before anything was measured: a 1 Gbit/s link. A guess, on the careful side.
const RATE_GUESS: Rate = Rate(117 << 20);
/// The least that a round must send to be a measure of bandwidth.
const SAMPLE_BYTES_MIN: Bytes = Bytes(4 << 20);
/// A run's entry in a `Memory` frame; every dirty page may be a run of its own.
const RUN_OVERHEAD_BYTES: u64 = 16;
/// A round improves the prediction if it takes off at least this part (one in ten).
const IMPROVEMENT_PART: u32 = 10;
/// Rounds without improvement after which the guest is said not to converge. A guess: a working
/// set that is larger than the limit allows shows the same prediction from the second round on.
const STALLED_ROUNDS_MAX: u32 = 5;
/// Least time without improvement after which the guest is said not to converge. Short rounds are over in
/// milliseconds: five of them may all fall into one burst of the guest or one delay of the host.
const STALLED_TIME_MIN: Duration = Duration::from_secs(2);
/// Most measurements of the fixed cost.
const DRY_RUNS_MAX: u32 = 5;
/// Rounds that are made although the limit is already met.
const POLISH_ROUNDS_MAX: u32 = 4;
/// Below this, dirty memory is not worth another round.
const POLISH_FLOOR: Duration = Duration::from_millis(1);
