//! How large one write of a process that fills or zeroes a disk may be. The node's heartbeat shares the path
//! to the storage and waits behind it: a write that takes longer than the lease resets the node. Linux
//! sends a zeroing without the help of the device as ordinary writes, all of them at once.

use std::time::Duration;

/// Sizes each write by the time that the previous one took. One is in flight at a time.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    bytes: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { bytes: FIRST_BYTES }
    }
}

impl Pace {
    /// The length of the next write, in bytes, of `left` bytes that are left. A multiple of 64 KiB, or `left`.
    #[must_use]
    pub fn piece(self, left: u64) -> u64 {
        self.bytes.min(left)
    }

    /// Learns from a write of `bytes` bytes.
    pub fn took(&mut self, bytes: u64, time: Duration) {
        if time > SLOW {
            self.bytes = (self.bytes / 2).max(LEAST_BYTES);
        } else if time < FAST && bytes == self.bytes {
            self.bytes = (self.bytes * 2).min(MOST_BYTES);
        }
    }
}

/// At 4 MB/s a quarter of a second.
const FIRST_BYTES: u64 = 1 << 20;
/// Storage that takes more than `SLOW` for this many is too slow for a lease of seconds anyway.
const LEAST_BYTES: u64 = 64 << 10;
/// What may be in flight when a fast path becomes slow at once. Arrays that zero without being sent zeroes do
/// this many in milliseconds.
const MOST_BYTES: u64 = 64 << 20;
/// Far below the shortest lease, so that a heartbeat that waits for one write is in time.
const SLOW: Duration = Duration::from_millis(250);
/// A write of twice the size stays below `SLOW`.
const FAST: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes of the writes of `length` bytes to storage of `rate` bytes a second.
    fn sizes(length: u64, rate: u64) -> Vec<u64> {
        let mut pace = Pace::default();
        let mut sizes = Vec::new();
        let mut done = 0;
        while done < length {
            let piece = pace.piece(length - done);
            pace.took(piece, Duration::from_micros(piece * 1_000_000 / rate));
            sizes.push(piece);
            done += piece;
        }
        sizes
    }

    #[test]
    fn slow_storage_gets_writes_of_a_quarter_second() {
        for rate in [1 << 20, 10 << 20, 200 << 20] {
            let sizes = sizes(64 << 30, rate);
            assert!(sizes[0] <= 1 << 20);
            let settled = &sizes[10..];
            let most = settled.iter().max().unwrap();
            assert!(*most <= rate / 4, "{most} bytes at {rate} bytes/s");
        }
    }

    #[test]
    fn storage_that_zeroes_at_once_gets_large_writes() {
        let sizes = sizes(1 << 40, 1 << 40);
        assert!(sizes.len() < 16_500, "{} writes for 1 TiB", sizes.len());
    }

    #[test]
    fn storage_that_becomes_slow_gets_smaller_writes_again() {
        let mut pace = Pace::default();
        for _ in 0..20 {
            pace.took(pace.bytes, Duration::from_millis(1));
        }
        assert_eq!(pace.bytes, MOST_BYTES);
        for _ in 0..20 {
            pace.took(pace.bytes, Duration::from_secs(1));
        }
        assert_eq!(pace.bytes, LEAST_BYTES);
    }
}
