//! Durations as Kubernetes (and Go) writes them.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// A length of time: whole numbers with a unit `h`, `m`, `s` or `ms`, largest unit first, for
/// example `300ms`, `90s` or `1h30m`.
///
/// Kept as it was written, so that a document reads back as its author wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Duration(String);

/// A text that is not a duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a duration: write whole numbers with a unit h, m, s or ms, such as 300ms, 90s or 1h30m"
)]
pub struct DurationError {
    text: String,
}

impl Duration {
    /// `duration` in milliseconds' resolution, written with the largest units that fit.
    #[must_use]
    pub fn from_std(duration: time::Duration) -> Self {
        let mut rest_ms = duration.as_millis();
        if rest_ms == 0 {
            return Self("0s".to_owned());
        }
        let mut text = String::new();
        for (unit, unit_ms) in UNITS {
            let unit_ms = u128::from(unit_ms);
            if rest_ms >= unit_ms {
                text.push_str(&format!("{}{unit}", rest_ms / unit_ms));
                rest_ms %= unit_ms;
            }
        }
        Self(text)
    }

    /// Parses the text, with millisecond resolution.
    ///
    /// # Errors
    /// [`DurationError`] when the text is none.
    pub fn to_std(&self) -> Result<time::Duration, DurationError> {
        let error = || DurationError {
            text: self.0.clone(),
        };
        let mut rest = self.0.as_str();
        let mut total_ms: u64 = 0;
        let mut units = UNITS.iter();
        if rest.is_empty() {
            return Err(error());
        }
        while !rest.is_empty() {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let number: u64 = rest[..digits].parse().map_err(|_| error())?;
            rest = &rest[digits..];
            let letters = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
            let unit_ms = units
                .find(|(unit, _)| *unit == &rest[..letters])
                .map(|(_, unit_ms)| *unit_ms)
                .ok_or_else(error)?;
            rest = &rest[letters..];
            total_ms = number
                .checked_mul(unit_ms)
                .and_then(|ms| ms.checked_add(total_ms))
                .ok_or_else(error)?;
        }
        Ok(time::Duration::from_millis(total_ms))
    }

    /// The text as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Duration {
    type Err = DurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let duration = Self(text.to_owned());
        duration.to_std().map(|_| duration)
    }
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl JsonSchema for Duration {
    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "maxLength": 32,
            "x-kubernetes-validations": [{
                "rule": "self.matches('^([0-9]{1,6}h)?([0-9]{1,6}m)?([0-9]{1,9}s)?([0-9]{1,9}ms)?$') && self != ''",
                "message": "write whole numbers with a unit h, m, s or ms, largest first, such as 300ms, 90s or 1h30m",
            }],
        })
    }
}

/// Units and their length in milliseconds, in the order in which they are written.
const UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn units_add_up() {
        let std = |text: &str| text.parse::<Duration>().unwrap().to_std().unwrap();
        assert_eq!(std("300ms"), time::Duration::from_millis(300));
        assert_eq!(std("1h30m"), time::Duration::from_secs(5400));
        assert_eq!(std("0s"), time::Duration::ZERO);
    }

    #[test]
    fn an_invalid_duration_is_refused_with_an_example() {
        for text in [
            "",
            "5",
            "s",
            "-5s",
            "1.5s",
            "1s1s",
            "1s1m",
            "5 s",
            "5d",
            "99999999999999999999h",
        ] {
            let error = text.parse::<Duration>().unwrap_err();
            assert!(error.to_string().contains("300ms"), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn every_count_of_milliseconds_reads_back(ms in 0..u64::MAX / 2) {
            let duration = time::Duration::from_millis(ms);
            prop_assert_eq!(Duration::from_std(duration).to_std(), Ok(duration));
        }
    }
}
