//! The times that make a lease safe. The superblock holds them; they change only while no node is
//! attached. Every heartbeat record repeats them, and a watcher uses those of the record it watches.

use std::time::Duration;

use crate::envelope::{BodyReader, BodyWriter, FormatError};

/// The largest clock rate error that is allowed for, ρ = 10⁻³, as 1/ρ.
pub const RHO_INVERSE: u32 = 1000;

/// The times of a volume. On disk each is a `u32` of milliseconds, 1 to 3,600,000.
///
/// ```text
/// offset size  field
///      0    4  lease, L
///      4    4  watch, W
///      8    4  poll
///     12    4  renewal
///     16    4  watchdog timeout
///     20    4  settle
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Timings {
    /// L: how long a node may write after it submitted a heartbeat that was acknowledged.
    pub lease: Duration,
    /// W: how long a watcher must see no new heartbeat before it may conclude that the lease has
    /// ended.
    pub watch: Duration,
    /// Interval at which a watcher reads the heartbeat slots.
    pub poll: Duration,
    /// Interval at which a node renews its lease.
    pub renewal: Duration,
    /// The longest timeout that a node's hardware watchdog may have.
    pub watchdog: Duration,
    /// Settle time: after the reset of its initiator a write lands within this time or never.
    pub settle: Duration,
}

/// Why times do not make a lease safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TimingError {
    /// A time is zero, has a fraction of a millisecond, or is more than an hour.
    #[error("{field} must be whole milliseconds, at least one and at most an hour")]
    Range {
        /// The name of the time.
        field: &'static str,
    },
    /// 2 · renewal ≤ L leaves room for a slow write and one retry.
    #[error("renewal must be at most half of the lease")]
    RenewalTooSlow,
    /// W ≥ 3 L is required wherever no persistent reservation is enforced.
    #[error("watch must be at least three times the lease")]
    WatchTooShort,
    /// 4 · poll ≤ W lets a watcher read the slot several times within W.
    #[error("poll must be at most a quarter of watch")]
    PollTooSlow,
}

impl Timings {
    /// Renewal every second, L 4 s, W 12 s, watchdog 10 s, settle 4 s: a safe time of 26 s.
    pub const DEFAULT: Self = Self {
        lease: Duration::from_secs(4),
        watch: Duration::from_secs(12),
        poll: Duration::from_millis(500),
        renewal: Duration::from_secs(1),
        watchdog: Duration::from_secs(10),
        settle: Duration::from_secs(4),
    };

    /// The safe time W + watchdog + settle: this long after its last heartbeat was seen to rise, a
    /// node with a hardware watchdog can no longer write.
    #[must_use]
    pub fn safe_time(&self) -> Duration {
        self.watch + self.watchdog + self.settle
    }

    /// Checks that these times make a lease safe.
    ///
    /// # Errors
    /// [`TimingError`] names the rule that is broken.
    pub fn validate(&self) -> Result<(), TimingError> {
        for (field, time) in self.fields() {
            let whole = time.subsec_nanos().is_multiple_of(1_000_000);
            if time.is_zero() || !whole || time > HOUR {
                return Err(TimingError::Range { field });
            }
        }
        if self.renewal * 2 > self.lease {
            return Err(TimingError::RenewalTooSlow);
        }
        // W ≥ L(1+ρ)/(1−ρ) follows from this one.
        if self.watch < self.lease * 3 {
            return Err(TimingError::WatchTooShort);
        }
        if self.poll * 4 > self.watch {
            return Err(TimingError::PollTooSlow);
        }
        Ok(())
    }

    const fn fields(&self) -> [(&'static str, Duration); 6] {
        [
            ("lease", self.lease),
            ("watch", self.watch),
            ("poll", self.poll),
            ("renewal", self.renewal),
            ("watchdog", self.watchdog),
            ("settle", self.settle),
        ]
    }

    pub(crate) fn encode(&self, body: &mut BodyWriter<'_>) {
        for (_, time) in self.fields() {
            body.u32(u32::try_from(time.as_millis()).unwrap_or(u32::MAX));
        }
    }

    pub(crate) fn parse(body: &mut BodyReader<'_>) -> Result<Self, FormatError> {
        let mut time = || Duration::from_millis(body.u32().into());
        let timings = Self {
            lease: time(),
            watch: time(),
            poll: time(),
            renewal: time(),
            watchdog: time(),
            settle: time(),
        };
        match timings.validate() {
            Ok(()) => Ok(timings),
            Err(_) => Err(FormatError::Field("timings")),
        }
    }
}

impl Default for Timings {
    fn default() -> Self {
        Self::DEFAULT
    }
}

const HOUR: Duration = Duration::from_secs(3600);
