//! Counters of a network device.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Counters, written by the device's thread.
#[derive(Debug, Default)]
pub struct NetMetrics {
    received_frames: AtomicU64,
    received_bytes: AtomicU64,
    received_drops: AtomicU64,
    sent_frames: AtomicU64,
    sent_bytes: AtomicU64,
    sent_drops: AtomicU64,
}

/// The counters at one moment. Directions are the guest's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NetCounts {
    /// Frames delivered to the guest.
    pub received_frames: u64,
    /// Bytes of those frames, without virtio-net headers.
    pub received_bytes: u64,
    /// Frames dropped because they fit no buffer of the guest.
    pub received_drops: u64,
    /// Frames that the guest sent.
    pub sent_frames: u64,
    /// Bytes of those frames, without virtio-net headers.
    pub sent_bytes: u64,
    /// Frames dropped because they were malformed or the tap refused them.
    pub sent_drops: u64,
}

impl NetMetrics {
    /// A snapshot of the counters; they are not read at one instant.
    #[must_use]
    pub fn counts(&self) -> NetCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetCounts {
            received_frames: get(&self.received_frames),
            received_bytes: get(&self.received_bytes),
            received_drops: get(&self.received_drops),
            sent_frames: get(&self.sent_frames),
            sent_bytes: get(&self.sent_bytes),
            sent_drops: get(&self.sent_drops),
        }
    }

    pub(super) fn received(&self, bytes: usize) {
        add(&self.received_frames, 1);
        add(&self.received_bytes, bytes);
    }

    pub(super) fn receive_dropped(&self) {
        add(&self.received_drops, 1);
    }

    pub(super) fn sent(&self, bytes: usize) {
        add(&self.sent_frames, 1);
        add(&self.sent_bytes, bytes);
    }

    pub(super) fn send_dropped(&self) {
        add(&self.sent_drops, 1);
    }
}

fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(u64::try_from(count).unwrap_or(0), Ordering::Relaxed);
}
