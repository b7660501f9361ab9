//! Which writes are unfinished, and where: what a later write or flush waits for.

use std::collections::{BTreeMap, BTreeSet};

use super::steps::step;

/// A range of bytes, as (start, end).
pub(super) type Span = (u64, u64);

/// A request of an engine, ordered by arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Arrival {
    /// Rises by one with each request of the engine.
    pub(super) sequence: u64,
    /// The key of its job.
    pub(super) job: usize,
}

/// The unfinished writes of an engine.
///
/// # Guarantees
/// A write is free when no earlier unfinished one overlaps it, and not before. For that it waits only for the newest
/// earlier write of each byte: this one is finished after all earlier ones of that byte. So an arrival divides at most two of the
/// ranges in `newest`, and replaces the others that it meets for good: whatever the writes are, the work for each is a constant
/// number of look-ups on average, and neither the ranges nor the waits are more than a constant times the unfinished writes.
#[derive(Debug, Default)]
pub(super) struct UnfinishedWrites {
    writes: BTreeMap<Arrival, Unfinished>,
    /// The newest write of each byte that any of them writes: disjoint ranges, by their starts.
    newest: BTreeMap<u64, Newest>,
}

#[derive(Debug, Default)]
struct Unfinished {
    /// Writes that must finish before it begins.
    waits_for: usize,
    /// Writes that wait for it.
    waited_by: Vec<Arrival>,
    /// The starts of the ranges of which it is the newest write.
    ranges: BTreeSet<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Newest {
    end: u64,
    write: Arrival,
}

impl UnfinishedWrites {
    /// A write arrived, later than all that have arrived. Returns whether it is free already.
    pub(super) fn arrived(&mut self, write: Arrival, (start, end): Span) -> bool {
        let mut unfinished = Unfinished::default();
        if start < end {
            for earlier in self.replace((start, end)) {
                if let Some(earlier) = self.writes.get_mut(&earlier) {
                    earlier.waited_by.push(write);
                    unfinished.waits_for += 1;
                }
            }
            self.newest.insert(start, Newest { end, write });
            unfinished.ranges.insert(start);
        }
        let is_free = unfinished.waits_for == 0;
        self.writes.insert(write, unfinished);
        is_free
    }

    /// A write is finished. Returns those that became free.
    pub(super) fn finished(&mut self, write: Arrival) -> Vec<Arrival> {
        let Some(finished) = self.writes.remove(&write) else {
            return Vec::new();
        };
        step(1 + finished.ranges.len() + finished.waited_by.len());
        for start in finished.ranges {
            self.newest.remove(&start);
        }
        let mut free = finished.waited_by;
        free.retain(|waiting| {
            self.writes.get_mut(waiting).is_some_and(|waiting| {
                waiting.waits_for -= 1;
                waiting.waits_for == 0
            })
        });
        free
    }

    /// Whether a write that arrived before `request` is unfinished.
    pub(super) fn any_before(&self, request: Arrival) -> bool {
        step(1);
        let first = self.writes.first_key_value();
        first.is_some_and(|(first, _)| *first < request)
    }

    /// Takes the ranges in `span` out of `newest`. Returns the writes to which they belonged.
    fn replace(&mut self, (start, end): Span) -> BTreeSet<Arrival> {
        self.divide(start);
        self.divide(end);
        let mut earlier = BTreeSet::new();
        while let Some((&at, &Newest { write, .. })) = self.newest.range(start..end).next() {
            step(1);
            self.newest.remove(&at);
            if let Some(unfinished) = self.writes.get_mut(&write) {
                unfinished.ranges.remove(&at);
            }
            earlier.insert(write);
        }
        earlier
    }

    /// Divides the range of `newest` around `at`, if there is one, so that a range begins there.
    fn divide(&mut self, at: u64) {
        step(1);
        let Some((_, range)) = self.newest.range_mut(..at).next_back() else {
            return;
        };
        if range.end <= at {
            return;
        }
        let right = *range;
        range.end = at;
        if let Some(unfinished) = self.writes.get_mut(&right.write) {
            unfinished.ranges.insert(at);
        }
        self.newest.insert(at, right);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn overlap((start, end): Span, (other_start, other_end): Span) -> bool {
        start.max(other_start) < end.min(other_end)
    }

    /// Which of the unfinished writes no earlier one overlaps: by comparison of each with each.
    fn free(unfinished: &BTreeMap<Arrival, Span>) -> BTreeSet<Arrival> {
        let is_free = |(write, span): &(&Arrival, &Span)| {
            let mut earlier = unfinished.range(..**write);
            !earlier.any(|(_, other)| overlap(**span, *other))
        };
        let writes = unfinished.iter().filter(is_free);
        writes.map(|(write, _)| *write).collect()
    }

    proptest! {
        #[test]
        fn a_write_is_free_exactly_when_a_comparison_with_each_finds_no_earlier_overlap(
            steps in proptest::collection::vec(
                (0_u64..64, 0_u64..24, proptest::option::of(0_usize..8)),
                1..96,
            ),
        ) {
            let mut writes = UnfinishedWrites::default();
            let mut unfinished = BTreeMap::new();
            let mut found = BTreeSet::new();
            for (sequence, (start, length, finishes)) in (0..).zip(steps) {
                let (write, span) = (Arrival { sequence, job: 0 }, (start, start + length));
                prop_assert_eq!(writes.any_before(write), !unfinished.is_empty());
                if writes.arrived(write, span) {
                    found.insert(write);
                }
                unfinished.insert(write, span);
                prop_assert_eq!(&found, &free(&unfinished));
                // Only a write that was free has begun and can finish.
                let finishing = finishes.and_then(|nth| found.iter().nth(nth).copied());
                if let Some(write) = finishing {
                    found.remove(&write);
                    unfinished.remove(&write);
                    found.extend(writes.finished(write));
                    prop_assert_eq!(&found, &free(&unfinished));
                }
                let ranges: usize = writes.writes.values().map(|write| write.ranges.len()).sum();
                prop_assert_eq!(ranges, writes.newest.len());
                prop_assert!(ranges <= 2 * unfinished.len());
            }
            while let Some(write) = found.pop_first() {
                found.extend(writes.finished(write));
            }
            prop_assert!(writes.writes.is_empty() && writes.newest.is_empty());
        }
    }
}
