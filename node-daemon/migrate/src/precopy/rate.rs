//! A rate of transfer.

use std::time::Duration;

use bascule_types::Bytes;

/// Bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate(pub u64);

impl Rate {
    /// How long `bytes` take.
    #[must_use]
    pub fn time_for(self, bytes: Bytes) -> Duration {
        let nanos = u128::from(bytes.0) * NANOS / u128::from(self.0.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    pub(super) fn of(bytes: Bytes, took: Duration) -> Self {
        let rate = u128::from(bytes.0) * NANOS / took.as_nanos().max(1);
        Self(u64::try_from(rate).unwrap_or(u64::MAX).max(1))
    }
}

const NANOS: u128 = 1_000_000_000;
