//! A range of TCP ports, as an administrator opens it in a firewall.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The ports from the first to the last, both included. Written `49152-49215`, or `49152` for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortRange {
    first: u16,
    last: u16,
}

/// What is wrong with a text that is no range of ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParsePortRangeError {
    /// Not two numbers with a hyphen, and not one number.
    #[error("expected FIRST-LAST, two TCP ports between 1 and 65535, e.g. 49152-49215")]
    Spelling,
    /// The last port comes before the first.
    #[error("the first port comes after the last")]
    Order,
}

impl PortRange {
    /// Where a node's VM processes wait for live migrations unless it is configured otherwise: the
    /// ports that libvirt uses for the same purpose, one for each migration that is under way.
    pub const MIGRATION: Self = Self {
        first: 49152,
        last: 49215,
    };

    /// The ports in ascending order.
    pub fn ports(self) -> impl Iterator<Item = u16> {
        self.first..=self.last
    }

    /// Whether both ranges have a port in common.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// `count` ports (at least one) from `first` on.
    #[must_use]
    pub const fn of(first: u16, count: u16) -> Self {
        Self {
            first,
            last: first.saturating_add(count.saturating_sub(1)),
        }
    }
}

impl FromStr for PortRange {
    type Err = ParsePortRangeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let port = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let port = digits.then(|| text.parse().ok()).flatten();
            port.filter(|port| *port != 0)
                .ok_or(ParsePortRangeError::Spelling)
        };
        let (first, last) = (port(first)?, port(last)?);
        if first > last {
            return Err(ParsePortRangeError::Order);
        }
        Ok(Self { first, last })
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

impl TryFrom<String> for PortRange {
    type Error = ParsePortRangeError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<PortRange> for String {
    fn from(range: PortRange) -> Self {
        range.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_written_as_it_is_read() {
        for text in ["49152-49215", "7", "1-65535"] {
            assert_eq!(text.parse::<PortRange>().unwrap().to_string(), text);
        }
        assert_eq!("5-5".parse::<PortRange>().unwrap().to_string(), "5");
        assert_eq!(PortRange::MIGRATION.ports().count(), 64);
    }

    #[test]
    fn what_is_no_range_of_ports_is_refused() {
        for text in [
            "", "-", "0", "0-5", "5-", "-5", "5-70000", "+5", "5 - 6", "a",
        ] {
            let refused = text.parse::<PortRange>();
            assert_eq!(refused, Err(ParsePortRangeError::Spelling), "{text:?}");
        }
        assert_eq!("6-5".parse::<PortRange>(), Err(ParsePortRangeError::Order));
    }

    #[test]
    fn ranges_overlap_where_they_share_a_port() {
        let range = |text: &str| text.parse::<PortRange>().unwrap();
        assert!(range("5-7").overlaps(range("7-9")));
        assert!(range("6").overlaps(range("5-7")));
        assert!(!range("5-7").overlaps(range("8-9")));
        assert_eq!(PortRange::of(5, 3), range("5-7"));
    }
}
