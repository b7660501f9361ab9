//! Byte quantities as Kubernetes writes them.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// A count of bytes in Kubernetes notation: a whole number with an optional suffix Ki, Mi, Gi, Ti
/// (powers of 1024) or k, M, G, T (powers of 1000), for example `512Mi` or `20Gi`.
///
/// Kept as it was written, so that a document reads back as its author wrote it; a number without
/// quotes, which Kubernetes takes for its own quantities too, becomes the text of its digits. A
/// scalar that is no quantity is read nevertheless and refused by [`Quantity::to_bytes`]: one bad
/// object must not keep a reader from the list that it is in.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
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

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextOrNumber)
    }
}

/// Reads both forms of the schema's int-or-string.
struct TextOrNumber;

impl Visitor<'_> for TextOrNumber {
    type Value = Quantity;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a quantity such as 512Mi, or a whole number of bytes")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Quantity, E> {
        Ok(Quantity(text.to_owned()))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Quantity, E> {
        Ok(Quantity(number.to_string()))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Quantity, E> {
        Ok(Quantity(number.to_string()))
    }

    fn visit_u128<E: de::Error>(self, number: u128) -> Result<Quantity, E> {
        Ok(Quantity(number.to_string()))
    }

    fn visit_i128<E: de::Error>(self, number: i128) -> Result<Quantity, E> {
        Ok(Quantity(number.to_string()))
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<Quantity, E> {
        Ok(Quantity(number.to_string()))
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
        // As Kubernetes' own quantities: without a type, and `pattern` for text only, `minimum` for
        // numbers only. No CEL rule here, but on the
        // fields of specs: before Kubernetes knew to use `maxLength` for its
        // estimate, matching in a list of 16 disks exceeded the cost that it lets a rule have.
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "pattern": PATTERN,
            "maxLength": 24,
            "minimum": 0,
        })
    }
}

/// Whole bytes with an optional suffix, for the schema.
const PATTERN: &str = "^[0-9]{1,16}(Ki|Mi|Gi|Ti|k|M|G|T)?$";

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
    fn an_invalid_quantity_is_refused_with_an_example() {
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

    /// Regression: `memory: 536870912` was refused with "must be of type string".
    #[test]
    fn a_number_without_quotes_is_a_count_of_bytes_in_yaml_and_in_json() {
        let yaml = |text: &str| serde_saphyr::from_str::<Quantity>(text).unwrap();
        assert_eq!(yaml("536870912").to_bytes(), Ok(512 << 20));
        assert_eq!(yaml("'536870912'"), yaml("536870912"));
        assert_eq!(yaml("512Mi").to_bytes(), Ok(512 << 20));
        let json = serde_json::from_str::<Quantity>("536870912").unwrap();
        assert_eq!(json, yaml("536870912"));
        assert_eq!(serde_json::to_string(&json).unwrap(), "\"536870912\"");
    }

    #[test]
    fn a_number_that_is_no_count_of_bytes_is_read_and_then_refused() {
        for text in [
            "-1",
            "1.5",
            "1e30",
            "99999999999999999999",
            "-9223372036854775809",
        ] {
            for read in [
                serde_saphyr::from_str::<Quantity>(text).unwrap(),
                serde_json::from_str::<Quantity>(text).unwrap(),
            ] {
                let error = read.to_bytes().unwrap_err();
                assert!(error.to_string().contains("512Mi"), "{text}: {error}");
            }
        }
    }

    #[test]
    fn the_schema_takes_text_and_numbers_and_refuses_the_same_as_the_parser() {
        let schema = Quantity::json_schema(&mut SchemaGenerator::default());
        let schema = schema.as_value();
        assert_eq!(schema["x-kubernetes-int-or-string"], true);
        assert_eq!(
            schema.get("type"),
            None,
            "the API server would take only that"
        );
        assert_eq!(schema["minimum"], 0);
    }

    proptest! {
        #[test]
        fn every_number_reads_as_the_same_bytes_with_and_without_quotes(bytes: u64) {
            let number: Quantity = serde_json::from_value(bytes.into()).unwrap();
            let text: Quantity = serde_json::from_value(bytes.to_string().into()).unwrap();
            prop_assert_eq!(number.to_bytes(), Ok(bytes));
            prop_assert_eq!(number, text);
        }

        #[test]
        fn every_count_of_bytes_reads_back(bytes: u64) {
            prop_assert_eq!(Quantity::from_bytes(bytes).to_bytes(), Ok(bytes));
        }
    }
}
