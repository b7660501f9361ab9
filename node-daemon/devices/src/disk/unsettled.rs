//! Where a write failed and may land later: no other write may be submitted there until it has settled.

use std::time::{Duration, Instant};

use super::overlap::Span;

/// The ranges of a disk on which a write failed less than the settle time ago.
///
/// A write that failed is assumed to land within the settle time or never, as one that fails after its
/// process died (docs/adr/0006-what-ends-a-write.md). Without the wait it would take the place of a later
/// write that was acknowledged: of one that the guest sends after it got the error, and of one that follows
/// an attempt that succeeded when the path was back. To submit the same write again needs no wait.
#[derive(Debug)]
pub(super) struct Unsettled {
    settle: Duration,
    ranges: Vec<Range>,
}

#[derive(Clone, Copy, Debug)]
struct Range {
    /// The first byte on the disk.
    start: u64,
    /// The byte after the last one.
    end: u64,
    until: Instant,
}

impl Unsettled {
    pub(super) fn new(settle: Duration) -> Self {
        let ranges = Vec::new();
        Self { settle, ranges }
    }

    /// A write of the bytes `start..end` of the disk failed.
    pub(super) fn failed(&mut self, (start, end): Span, now: Instant) {
        let until = now + self.settle;
        // The same write, again and again.
        self.ranges.retain(|range| {
            let covered = start <= range.start && range.end <= end;
            range.until > now && !covered
        });
        self.ranges.push(Range { start, end, until });
        if self.ranges.len() > RANGES_MAX {
            self.merge();
        }
    }

    /// Until when a write of the bytes `start..end` has to wait, if it has to.
    pub(super) fn blocked_until(
        &mut self,
        (start, end): Span,
        now: impl FnOnce() -> Instant,
    ) -> Option<Instant> {
        if self.ranges.is_empty() {
            return None;
        }
        let now = now();
        self.ranges.retain(|range| range.until > now);
        let ranges = self.ranges.iter();
        let overlapping = ranges.filter(|range| range.start < end && start < range.end);
        overlapping.map(|range| range.until).max()
    }

    /// One range in place of all, which covers them.
    fn merge(&mut self) {
        let merged = self.ranges.drain(..).reduce(|a, b| Range {
            start: a.start.min(b.start),
            end: a.end.max(b.end),
            until: a.until.max(b.until),
        });
        self.ranges.extend(merged);
    }
}

/// Above this many the ranges become one: a device that fails every write must cost no more and more memory.
/// Above what a guest has in flight on a path that is lost.
const RANGES_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    const SETTLE: Duration = Duration::from_secs(4);

    #[test]
    fn a_range_waits_until_its_last_failed_write_has_settled() {
        let start = Instant::now();
        let mut unsettled = Unsettled::new(SETTLE);
        let mut until = |range, at, failed: Option<Span>| {
            failed.inspect(|failed| unsettled.failed(*failed, at));
            unsettled.blocked_until(range, || at)
        };
        assert_eq!(until((0, 4096), start, None), None);
        until((0, 0), start, Some((4096, 8192)));
        let second = start + Duration::from_secs(1);
        let settled = Some(second + SETTLE);
        assert_eq!(until((4096, 8192), second, Some((4096, 8192))), settled);
        assert_eq!(until((0, 4097), second, None), settled);
        assert_eq!(until((8191, 9000), second, None), settled);
        assert_eq!(until((0, 4096), second, None), None);
        assert_eq!(until((8192, 9000), second, None), None);
        let third = second + Duration::from_secs(1);
        let last = Some(third + SETTLE);
        assert_eq!(until((4096, 12_288), third, Some((8192, 12_288))), last);
        assert_eq!(until((4096, 8192), start + SETTLE, None), settled);
        assert_eq!(until((4096, 8192), second + SETTLE, None), None);
        assert_eq!(until((4096, 12_288), second + SETTLE, None), last);
    }

    #[test]
    fn a_device_that_fails_every_write_costs_a_bounded_number_of_ranges() {
        let now = Instant::now();
        let mut unsettled = Unsettled::new(SETTLE);
        for n in 0..10 * RANGES_MAX as u64 {
            unsettled.failed((n * 512, n * 512 + 512), now);
            assert!(unsettled.ranges.len() <= RANGES_MAX);
            let mut blocked = |range| unsettled.blocked_until(range, || now).is_some();
            assert!(blocked((n * 512, n * 512 + 1)) && blocked((0, 1)));
        }
    }
}
