//! Whether the writes of a disk writer have ended.

use serde::{Deserialize, Serialize};

/// Whether every write that a writer submitted is known to have ended.
///
/// A submitted write ends only by success, by a reset of its initiator plus the settle time, or by
/// the abort of an enforced persistent reservation. A write that completed with an error, or that
/// was given up after a time-out, may still land. So an unclean writer stays unclean: retries,
/// later successes and an idle counter of 0 change nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[must_use]
pub enum WriterState {
    /// Every submitted write and flush has succeeded.
    #[default]
    Clean,
    /// A write or flush failed, or its outcome is unknown: it may land at any later time.
    Unclean,
}

impl WriterState {
    /// The state of two writers together: clean only if both are.
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Clean, Self::Clean) => Self::Clean,
            _ => Self::Unclean,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::WriterState::{Clean, Unclean};

    #[test]
    fn writers_are_clean_together_only_if_all_are() {
        assert_eq!(Clean.and(Clean), Clean);
        assert_eq!(Clean.and(Unclean), Unclean);
        assert_eq!(Unclean.and(Clean), Unclean);
        assert_eq!(Unclean.and(Unclean), Unclean);
    }
}
