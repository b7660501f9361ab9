//! Byte quantities as Kubernetes writes them.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// A count of bytes in Kubernetes notation: a whole number with an optional suffix Ki, Mi, Gi, Ti
/// (powers of 1024) or k, M, G, T (powers of 1000), for example `512Mi` or `20Gi`.
///
/// Kept as it was written, so that a document reads back as its author wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Quantity(String);

/// A text that is not a quantity of bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a quantity: write a whole number of bytes with an optional suffix, such as 512Mi or 20Gi"
)]
pub struct QuantityError {
    text: String,
}

impl Quantity {
    /// `bytes` with the largest binary suffix that divides it.
    #[must_use]
    pub fn from_bytes(bytes: u64) -> Self {
        for (suffix, factor) in BINARY_SUFFIXES {
            if bytes != 0 && bytes.is_multiple_of(factor) {
                return Self(format!("{}{suffix}", bytes / factor));
            }
        }
        Self(bytes.to_string())
    }

    /// The value in bytes.
    ///
    /// # Errors
    /// [`QuantityError`] when the text is none, or is larger than 64 bits hold.
    pub fn to_bytes(&self) -> Result<u64, QuantityError> {
        let error = || QuantityError {
            text: self.0.clone(),
        };
        let digits = self.0.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let suffix = &self.0[digits.len()..];
        let factor = SUFFIXES
            .iter()
            .find(|(name, _)| *name == suffix)
            .map(|(_, factor)| *factor)
            .ok_or_else(error)?;
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(error());
        }
        let number: u64 = digits.parse().map_err(|_| error())?;
        number.checked_mul(factor).ok_or_else(error)
    }

    /// The text as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Quantity {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let quantity = Self(text.to_owned());
        quantity.to_bytes().map(|_| quantity)
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl JsonSchema for Quantity {
    fn schema_name() -> Cow<'static, str> {
        "Quantity".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "maxLength": 24,
            "x-kubernetes-validations": [{
                "rule": "self.matches('^[0-9]{1,16}(Ki|Mi|Gi|Ti|k|M|G|T)?$')",
                "message": "write a whole number of bytes with an optional suffix Ki, Mi, Gi, Ti, k, M, G or T, such as 512Mi or 20Gi",
            }],
        })
    }
}

/// Largest first, for writing.
const BINARY_SUFFIXES: [(&str, u64); 4] = [
    ("Ti", 1 << 40),
    ("Gi", 1 << 30),
    ("Mi", 1 << 20),
    ("Ki", 1 << 10),
];

/// Everything that may be written.
const SUFFIXES: [(&str, u64); 9] = [
    ("", 1),
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024_or_of_1000() {
        let bytes = |text: &str| text.parse::<Quantity>().unwrap().to_bytes().unwrap();
        assert_eq!(bytes("512Mi"), 512 << 20);
        assert_eq!(bytes("2G"), 2_000_000_000);
        assert_eq!(bytes("0"), 0);
    }

    #[test]
    fn what_is_no_quantity_is_refused_with_an_example() {
        for text in [
            "",
            "Mi",
            "-1",
            "1.5Gi",
            "1 Gi",
            "1gi",
            "1e3",
            "99999999999999999999",
            "9999999999Ti",
        ] {
            let error = text.parse::<Quantity>().unwrap_err();
            assert!(error.to_string().contains("512Mi"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn every_count_of_bytes_reads_back(bytes: u64) {
            prop_assert_eq!(Quantity::from_bytes(bytes).to_bytes(), Ok(bytes));
        }
    }
}
