//! The host's clocks, as the guest's timers read them.

use std::fmt::Debug;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

/// The host's clocks.
pub(crate) trait HostClock: Debug + Send + Sync {
    /// A time that only grows, from an arbitrary start.
    fn monotonic(&self) -> Duration;

    /// Coordinated universal time since 1970; may be set at any time.
    fn realtime(&self) -> Duration;
}

/// This host's.
#[derive(Debug)]
pub(crate) struct SystemClock;

impl HostClock for SystemClock {
    fn monotonic(&self) -> Duration {
        let now = clock_gettime(ClockId::Monotonic);
        Duration::new(
            u64::try_from(now.tv_sec).unwrap_or(0),
            u32::try_from(now.tv_nsec).unwrap_or(0),
        )
    }

    fn realtime(&self) -> Duration {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.unwrap_or_default()
    }
}

/// Clocks that tests set.
#[cfg(test)]
#[derive(Debug, Default)]
pub(crate) struct ManualClock(std::sync::Mutex<(Duration, Duration)>);

#[cfg(test)]
impl ManualClock {
    /// Both clocks of a host on which it is `realtime`.
    pub(crate) fn at(monotonic: Duration, realtime: Duration) -> std::sync::Arc<Self> {
        std::sync::Arc::new(Self(std::sync::Mutex::new((monotonic, realtime))))
    }

    /// `time` passes.
    pub(crate) fn advance(&self, time: Duration) {
        let mut clocks = self.0.lock().unwrap();
        clocks.0 += time;
        clocks.1 += time;
    }
}

#[cfg(test)]
impl HostClock for ManualClock {
    fn monotonic(&self) -> Duration {
        self.0.lock().unwrap().0
    }

    fn realtime(&self) -> Duration {
        self.0.lock().unwrap().1
    }
}
