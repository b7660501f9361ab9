//! What an entropy device counts.

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
    /// Requests answered.
    pub requests: u64,
    /// Bytes given.
    pub bytes: u64,
}

impl RngMetrics {
    /// The counters now.
    #[must_use]
    pub fn counts(&self) -> RngCounts {
        RngCounts {
            requests: self.requests.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }

    pub(super) fn answered(&self, bytes: usize) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes
            .fetch_add(u64::try_from(bytes).unwrap_or(0), Ordering::Relaxed);
    }
}
