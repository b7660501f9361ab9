//! Sub-requests that wait for the ring, and the writes among them for the gate.

use std::collections::VecDeque;

use super::steps::step;

/// The keys of sub-requests to submit, in the order in which they became ready.
///
/// Writes lie apart, so that those which a closed gate holds back are not looked at for each read that passes them.
#[derive(Debug, Default)]
pub(super) struct Ready {
    writes: VecDeque<Numbered>,
    others: VecDeque<Numbered>,
    next_number: u64,
}

#[derive(Clone, Copy, Debug)]
struct Numbered {
    number: u64,
    key: usize,
}

impl Ready {
    pub(super) fn push(&mut self, key: usize, is_write: bool) {
        let number = self.next_number;
        self.next_number += 1;
        let queue = if is_write {
            &mut self.writes
        } else {
            &mut self.others
        };
        queue.push_back(Numbered { number, key });
    }

    /// Whether the next one is a write; without `writes`, none is. `None` when there is no next one.
    pub(super) fn next_is_write(&self, writes: bool) -> Option<bool> {
        step(1);
        let write = self.writes.front().filter(|_| writes);
        match (write, self.others.front()) {
            (Some(write), Some(other)) => Some(write.number < other.number),
            (write, other) => write.or(other).map(|_| write.is_some()),
        }
    }

    /// Takes the next write, or the next of the others.
    pub(super) fn take(&mut self, is_write: bool) -> Option<usize> {
        let queue = if is_write {
            &mut self.writes
        } else {
            &mut self.others
        };
        queue.pop_front().map(|own| own.key)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.writes.is_empty() && self.others.is_empty()
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(ready: &mut Ready, writes: bool) -> Vec<usize> {
        std::iter::from_fn(|| {
            let is_write = ready.next_is_write(writes)?;
            ready.take(is_write)
        })
        .collect()
    }

    #[test]
    fn all_are_taken_in_order_and_without_writes_the_others() {
        let mut ready = Ready::default();
        for (key, is_write) in [(7, true), (3, false), (5, false), (4, true), (9, false)] {
            ready.push(key, is_write);
        }
        let mut others = Ready::default();
        for (key, is_write) in [(7, true), (3, false), (4, true), (9, false)] {
            others.push(key, is_write);
        }
        assert_eq!(taken(&mut ready, true), [7, 3, 5, 4, 9]);
        assert!(ready.is_empty());
        assert_eq!(taken(&mut others, false), [3, 9]);
        assert!(!others.is_empty());
        assert_eq!(taken(&mut others, true), [7, 4]);
    }
}
