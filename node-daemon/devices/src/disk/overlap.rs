//! Which writes are unfinished, and where: what a later write or flush waits for.

use std::collections::{BTreeMap, BTreeSet};

/// A range of bytes, as (start, end).
type Span = (u64, u64);

/// The unfinished writes of an engine. No two that have begun overlap.
#[derive(Debug, Default)]
pub(super) struct UnfinishedWrites {
    /// The sequence numbers of all of them.
    sequences: BTreeSet<u64>,
    /// The end of each that has begun, by its start.
    begun: BTreeMap<u64, u64>,
}

impl UnfinishedWrites {
    /// A write arrived.
    pub(super) fn arrived(&mut self, sequence: u64) {
        self.sequences.insert(sequence);
    }

    /// A write begins. Nothing that has begun may overlap it.
    pub(super) fn begins(&mut self, (start, end): Span) {
        if start < end {
            self.begun.insert(start, end);
        }
    }

    /// A write that had begun is finished.
    pub(super) fn finished(&mut self, sequence: u64, (start, end): Span) {
        self.sequences.remove(&sequence);
        if start < end {
            self.begun.remove(&start);
        }
    }

    /// Whether a write that arrived before `sequence` is unfinished.
    pub(super) fn any_before(&self, sequence: u64) -> bool {
        self.sequences
            .first()
            .is_some_and(|first| *first < sequence)
    }

    /// Whether a write that has begun overlaps `span`.
    pub(super) fn overlap(&self, (start, end): Span) -> bool {
        // They are disjoint, so the last one that starts before the end reaches farthest.
        let last = self.begun.range(..end).next_back();
        start < end && last.is_some_and(|(_, last_end)| *last_end > start)
    }

    /// Forgets all of them.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn overlap((start, end): Span, (other_start, other_end): Span) -> bool {
        start.max(other_start) < end.min(other_end)
    }

    proptest! {
        #[test]
        fn overlaps_are_those_that_a_comparison_with_each_finds(
            spans in proptest::collection::vec((0_u64..64, 0_u64..8, any::<bool>()), 1..64),
        ) {
            let mut writes = UnfinishedWrites::default();
            let mut begun: Vec<(u64, Span)> = Vec::new();
            for (sequence, (start, length, finish)) in (0..).zip(spans) {
                let span = (start, start + length);
                let expected = begun.iter().any(|(_, other)| overlap(span, *other));
                prop_assert_eq!(writes.overlap(span), expected);
                prop_assert_eq!(writes.any_before(sequence), !begun.is_empty());
                if !expected {
                    writes.arrived(sequence);
                    writes.begins(span);
                    begun.push((sequence, span));
                }
                if finish && !begun.is_empty() {
                    let (sequence, span) = begun.remove(begun.len() / 2);
                    writes.finished(sequence, span);
                }
            }
        }
    }
}
