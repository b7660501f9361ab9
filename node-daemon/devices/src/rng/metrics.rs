//! Counters of an entropy device.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Counters, written by the device's thread.
#[derive(Debug, Default)]
pub struct RngMetrics {
    requests: AtomicU64,
    bytes: AtomicU64,
}

/// The counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RngCounts {
    /// Requests completed.
    pub requests: u64,
    /// Random bytes written to the guest.
    pub bytes: u64,
}

impl RngMetrics {
    /// A snapshot of the counters; they are not read at one instant.
    #[must_use]
    pub fn counts(&self) -> RngCounts {
        RngCounts {
            requests: self.requests.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }

    pub(super) fn completed(&self, bytes: usize) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes
            .fetch_add(u64::try_from(bytes).unwrap_or(0), Ordering::Relaxed);
    }
}
