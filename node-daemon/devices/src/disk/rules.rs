//! The switch with which a simulation breaks one rule of the disk's error handling, to show that the rule
//! is needed.

/// The rules in force. A release enforces all; with the feature `fault-injection` a test may break one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    #[cfg(feature = "fault-injection")]
    broken: Option<Mutation>,
}

impl Rules {
    /// Every rule in force.
    pub const ENFORCED: Self = Self {
        #[cfg(feature = "fault-injection")]
        broken: None,
    };

    /// Every rule in force but one.
    #[cfg(feature = "fault-injection")]
    #[must_use]
    pub const fn without(broken: Mutation) -> Self {
        Self {
            broken: Some(broken),
        }
    }

    #[cfg(feature = "fault-injection")]
    pub(super) fn breaks(self, mutation: Mutation) -> bool {
        self.broken == Some(mutation)
    }
}

/// One way to break a rule.
#[cfg(feature = "fault-injection")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// `EIO` is the guest's error: nobody looks whether the device is there.
    EioWithoutProbe,
    /// One `EIO` is the guest's error if the device is there right after it.
    EioJudgedAtOnce,
    /// `EIO` is a lost path, also while the device is there.
    EioIsLostPath,
    /// The guest gets the error of a lost path.
    PathErrorShown,
    /// A write that failed counts as one that has ended: its writer stays clean.
    FailedWriteEnds,
    /// A write is submitted although an earlier one that failed on its blocks may land after it.
    OverlapBeforeSettle,
}

/// Whether the named mutation is switched on. Constant `false` in a release.
#[cfg(feature = "fault-injection")]
macro_rules! broken {
    ($rules:expr, $mutation:ident) => {
        $rules.breaks($crate::disk::Mutation::$mutation)
    };
}

/// Whether the named mutation is switched on. Constant `false` in a release.
#[cfg(not(feature = "fault-injection"))]
macro_rules! broken {
    ($rules:expr, $mutation:ident) => {
        $rules != $crate::disk::rules::Rules::ENFORCED
    };
}

pub(super) use broken;
