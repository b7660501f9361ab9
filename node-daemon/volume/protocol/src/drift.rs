//! The bound on the rate error of clocks.

use std::time::Duration;

use bascule_volume_format::RHO_INVERSE;

/// A bound ρ on the rate error of every clock, kept as 1/ρ: while a true second passes, a clock
/// counts between 1 − ρ and 1 + ρ seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Drift {
    /// 1/ρ; more than 1.
    pub rho_inverse: u32,
}

impl Drift {
    /// The bound that the format assumes: ρ = 10⁻³.
    pub const ASSUMED: Self = Self {
        rho_inverse: RHO_INVERSE,
    };

    /// The shortest W for a lease L: L(1+ρ)/(1−ρ), rounded up to a nanosecond. A holder whose
    /// clock is slow still holds its lease while a watcher's fast clock counts this long.
    ///
    /// # Panics
    /// When 1/ρ is not more than 1.
    #[must_use]
    pub fn watch_min(self, lease: Duration) -> Duration {
        assert!(self.rho_inverse > 1, "a clock's rate error is below 100 %");
        let inverse = u128::from(self.rho_inverse);
        let nanoseconds = (lease.as_nanos() * (inverse + 1)).div_ceil(inverse - 1);
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use bascule_volume_format::Timings;

    use super::*;

    #[test]
    fn the_shortest_watch_allows_for_a_slow_holder_and_a_fast_watcher() {
        let third = Drift { rho_inverse: 3 };
        assert_eq!(
            third.watch_min(Duration::from_secs(4)),
            Duration::from_secs(8)
        );
        let lease = Duration::from_secs(999);
        assert_eq!(Drift::ASSUMED.watch_min(lease), Duration::from_secs(1001));
    }

    #[test]
    fn times_that_the_format_accepts_allow_for_drift() {
        let times = Timings::DEFAULT;
        assert_eq!(times.validate(), Ok(()));
        assert!(times.watch >= Drift::ASSUMED.watch_min(times.lease));
    }
}
