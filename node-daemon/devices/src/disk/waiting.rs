//! The requests that have arrived and not begun, each in the place of what it waits for.
//!
//! # States
//! ```text
//!  ordered ──► free ──► begun
//!               │▲
//!               │└────────────┐
//!               ├──► settling ┤
//!               └──► for room ┘
//! ```
//! *Ordered* is a write that an earlier one overlaps, and a flush before which a write is unfinished. *Settling* is a
//! write to blocks on which one failed that may still land. *For room* waits for its bounce buffer.
//!
//! # Guarantees
//! A request is looked at when what it waits for has come to an end, and not whenever something has: a guest whose
//! requests all wait for each other must not delay the thread that they are performed by.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use super::overlap::{Arrival, Span, UnfinishedWrites};
use super::request::Operation;
use super::steps::step;

/// The requests that have not begun.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    unfinished_writes: UnfinishedWrites,
    /// Ordered flushes; the first is the first that can become free.
    flushes: VecDeque<Arrival>,
    free: BTreeSet<Arrival>,
    /// With the time at which the last failed write on their blocks has settled.
    settling: BTreeSet<(Instant, Arrival)>,
    /// Apart, because writes may hold their room for as long as the gate is closed.
    reads_for_room: VecDeque<NeedsRoom>,
    writes_for_room: VecDeque<NeedsRoom>,
}

#[derive(Clone, Copy, Debug)]
struct NeedsRoom {
    arrival: Arrival,
    bytes: usize,
}

/// A request that may begin unless something else holds it back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) arrival: Arrival,
    /// It has waited for room, and there is some.
    pub(super) has_room: bool,
}

impl Waiting {
    /// A request arrived that touches the blocks of `span`.
    pub(super) fn arrived(&mut self, arrival: Arrival, operation: &Operation, span: Span) {
        let is_free = match operation {
            Operation::Read { .. } => true,
            Operation::Write { .. } => self.unfinished_writes.arrived(arrival, span),
            Operation::Flush => !self.unfinished_writes.any_before(arrival),
        };
        if is_free {
            self.free.insert(arrival);
        } else if matches!(operation, Operation::Flush) {
            self.flushes.push_back(arrival);
        }
    }

    /// A write that had begun is finished.
    pub(super) fn finished(&mut self, write: Arrival) {
        self.free.extend(self.unfinished_writes.finished(write));
        while let Some(flush) = self.flushes.front().copied()
            && !self.unfinished_writes.any_before(flush)
        {
            self.flushes.pop_front();
            self.free.insert(flush);
        }
    }

    /// Frees the writes for which everything has settled that had failed on their blocks.
    pub(super) fn free_settled(&mut self, now: impl FnOnce() -> Instant) {
        if self.settling.is_empty() {
            return;
        }
        let now = now();
        while let Some((until, write)) = self.settling.first().copied()
            && until <= now
        {
            step(1);
            self.settling.pop_first();
            self.free.insert(write);
        }
    }

    /// Takes the next request to begin out: one that waits for room, if `has_room` for its bytes, or else a free one.
    pub(super) fn next(&mut self, has_room: impl Fn(usize) -> bool) -> Option<Candidate> {
        step(1);
        for queue in [&mut self.reads_for_room, &mut self.writes_for_room] {
            if let Some(first) = queue.pop_front_if(|first| has_room(first.bytes)) {
                return Some(Candidate {
                    arrival: first.arrival,
                    has_room: true,
                });
            }
        }
        let arrival = self.free.pop_first()?;
        Some(Candidate {
            arrival,
            has_room: false,
        })
    }

    /// A candidate waits until `until`: a write failed on its blocks.
    pub(super) fn settles(&mut self, write: Arrival, until: Instant) {
        self.settling.insert((until, write));
    }

    /// A candidate waits for room for a bounce buffer of `bytes`.
    pub(super) fn awaits_room(&mut self, arrival: Arrival, is_write: bool, bytes: usize) {
        let queue = if is_write {
            &mut self.writes_for_room
        } else {
            &mut self.reads_for_room
        };
        queue.push_back(NeedsRoom { arrival, bytes });
    }

    /// How long until the next write has to be looked at that waits for nothing but that a failed one settles.
    pub(super) fn settling_wait(&self, now: Instant) -> Option<Duration> {
        let (until, _) = self.settling.first()?;
        Some(until.saturating_duration_since(now))
    }

    /// Whether a write waits for nothing but that a failed one settles.
    pub(super) fn awaits_settling(&self) -> bool {
        !self.settling.is_empty()
    }

    /// Drops all of them.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}
