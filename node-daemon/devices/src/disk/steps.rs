//! Counts the steps that an engine takes, for the test that bounds them. A release counts nothing.

#[cfg(test)]
thread_local! {
    static TAKEN: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Something was looked at: `count` requests, ranges or segments.
#[cfg(test)]
pub(super) fn step(count: usize) {
    TAKEN.set(TAKEN.get() + count);
}

/// Something was looked at: `count` requests, ranges or segments.
#[cfg(not(test))]
pub(super) const fn step(_count: usize) {}

/// The steps of this thread since the last call.
#[cfg(test)]
pub(super) fn take_steps() -> usize {
    TAKEN.take()
}
