//! The hash that an image must have.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The hash that an image must have, in hexadecimal digits of either case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageDigest {
    /// SHA-256: 64 digits.
    Sha256(String),
    /// SHA-512: 128 digits.
    Sha512(String),
}

impl ImageDigest {
    /// Of a source that names exactly one of the two; none if it names both or neither.
    #[must_use]
    pub fn of(sha256: Option<&str>, sha512: Option<&str>) -> Option<Self> {
        match (sha256, sha512) {
            (Some(digits), None) => Some(Self::Sha256(digits.to_owned())),
            (None, Some(digits)) => Some(Self::Sha512(digits.to_owned())),
            _ => None,
        }
    }

    /// The name of the hash.
    #[must_use]
    pub const fn algorithm(&self) -> &'static str {
        match self {
            Self::Sha256(_) => "SHA-256",
            Self::Sha512(_) => "SHA-512",
        }
    }

    /// The digits.
    #[must_use]
    pub fn digits(&self) -> &str {
        match self {
            Self::Sha256(digits) | Self::Sha512(digits) => digits,
        }
    }
}

impl fmt::Display for ImageDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.algorithm(), self.digits())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_one_hash_is_taken() {
        let digest = |a, b| ImageDigest::of(a, b).map(|digest| digest.to_string());
        assert_eq!(digest(Some("ab"), None).as_deref(), Some("SHA-256 ab"));
        assert_eq!(digest(None, Some("cd")).as_deref(), Some("SHA-512 cd"));
        assert_eq!(digest(Some("ab"), Some("cd")), None);
        assert_eq!(digest(None, None), None);
    }
}
