//! Random numbers that depend on seed and step alone: any step can be repeated by itself.

use bascule_probe_wire::pattern::mix;

/// A generator (splitmix64).
#[derive(Debug)]
pub(super) struct Random(u64);

impl Random {
    /// The generator of one step.
    pub(super) const fn of_step(seed: u64, step: u64) -> Self {
        Self(mix(seed ^ mix(step)))
    }

    /// Any number.
    pub(super) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0)
    }

    /// A number below `end`, which is not 0.
    pub(super) const fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// True once in `times`.
    pub(super) const fn chance(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// One of `choices`, of which there is at least one.
    pub(super) const fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// A number as parsers dislike it: 0, all ones, around a power of two, small, or any.
    pub(super) const fn value(&mut self) -> u64 {
        let power = 1_u64 << self.below(64);
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => power,
            3 => power.wrapping_sub(1),
            4 => power.wrapping_add(1),
            5 => self.below(256),
            _ => self.next(),
        }
    }
}
