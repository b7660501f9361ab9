//! Counters of a block device.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bascule_types::WriterState;
use serde::Serialize;

use crate::disk::EngineStats;

/// Counters, written by the device's thread.
#[derive(Debug, Default)]
pub struct BlkMetrics {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    write_bytes: AtomicU64,
    flushes: AtomicU64,
    errors: AtomicU64,
    read_modify_writes: AtomicU64,
    in_flight: AtomicU64,
    stalled: AtomicBool,
    unclean: AtomicBool,
}

/// The counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BlkCounts {
    /// Reads completed with success.
    pub reads: u64,
    /// Bytes read by those.
    pub read_bytes: u64,
    /// Writes completed with success.
    pub writes: u64,
    /// Bytes written by those.
    pub write_bytes: u64,
    /// Flushes completed with success.
    pub flushes: u64,
    /// Requests completed with `VIRTIO_BLK_S_IOERR` or `VIRTIO_BLK_S_UNSUPP`.
    pub errors: u64,
    /// Writes that covered a device block in part, each of which cost a read.
    pub read_modify_writes: u64,
    /// io_uring commands in flight when the device thread last updated the counters.
    pub in_flight: u64,
    /// Whether writes are waiting for the write gate.
    pub stalled: bool,
    /// Unclean, permanently, after a write or flush failed: that write may still land, even when
    /// `in_flight` is 0.
    pub writer_state: WriterState,
}

/// The kinds of requests that the disk performs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestKind {
    Read,
    Write,
    Flush,
}

impl BlkMetrics {
    /// A snapshot of the counters; they are not read at one instant.
    #[must_use]
    pub fn counts(&self) -> BlkCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlkCounts {
            reads: get(&self.reads),
            read_bytes: get(&self.read_bytes),
            writes: get(&self.writes),
            write_bytes: get(&self.write_bytes),
            flushes: get(&self.flushes),
            errors: get(&self.errors),
            read_modify_writes: get(&self.read_modify_writes),
            in_flight: get(&self.in_flight),
            stalled: self.stalled.load(Ordering::Relaxed),
            writer_state: if self.unclean.load(Ordering::Relaxed) {
                WriterState::Unclean
            } else {
                WriterState::Clean
            },
        }
    }

    pub(super) fn completed(&self, kind: RequestKind, data_bytes: usize) {
        let bytes = u64::try_from(data_bytes).unwrap_or(0);
        let (count, total) = match kind {
            RequestKind::Read => (&self.reads, Some(&self.read_bytes)),
            RequestKind::Write => (&self.writes, Some(&self.write_bytes)),
            RequestKind::Flush => (&self.flushes, None),
        };
        count.fetch_add(1, Ordering::Relaxed);
        if let Some(total) = total {
            total.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    pub(super) fn failed(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn record(&self, stats: EngineStats) {
        self.stalled.store(stats.stalled, Ordering::Relaxed);
        let unclean = stats.writer_state == WriterState::Unclean;
        self.unclean.store(unclean, Ordering::Relaxed);
        self.read_modify_writes
            .store(stats.read_modify_writes, Ordering::Relaxed);
        self.in_flight.store(stats.in_flight, Ordering::Relaxed);
    }
}
