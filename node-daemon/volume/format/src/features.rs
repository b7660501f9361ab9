//! Features of a volume's format that a release must know, to write the volume or to read it.
//!
//! # How a feature is raised
//! ```text
//!   every joined node's newest heartbeat has it ──► the coordinator journals it ──► the superblock announces it
//! ```
//! The journal is the truth: from that record on, no node joins without the feature. The superblock follows, so that a
//! release without the feature refuses the volume before it reads anything else. A feature is never lowered.

use std::fmt;

/// A set of features, one bit each. Bits 0 to 31: a release that does not know one may read the volume, and must not
/// write it (ro-compat). Bits 32 to 63: it must not use the volume at all (incompat). What a release may ignore
/// needs no bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Features(u64);

impl Features {
    /// No feature.
    pub const NONE: Self = Self(0);
    /// The features that this release knows. Format version 2 has none yet.
    pub const KNOWN: Self = Self::NONE;

    /// The set with these bits, known or not.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// One bit for each feature.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The features of either set.
    #[must_use]
    pub const fn with(self, more: Self) -> Self {
        Self(self.0 | more.0)
    }

    /// The features of this set that the other one lacks.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The features of both sets.
    #[must_use]
    pub const fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The features that a release must know to use the volume at all.
    #[must_use]
    pub const fn incompat(self) -> Self {
        Self(self.0 & INCOMPAT)
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A volume that this release must not write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a newer release is needed to write the volume: it has the features {0}, which this one does not know"
)]
pub struct UnknownFeatures(pub Features);

const INCOMPAT: u64 = 0xFFFF_FFFF_0000_0000;
