//! The header with which a server is asked for an image.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::SecretKey;

/// The value of an HTTP header Authorization (RFC 9110, 11.6.2), such as `Bearer abc`. No log, message or status shows
/// it: there is no `Display`, and `Debug` says only that it is there.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HttpAuthorization(String);

/// Why a text is no value of the header; it does not quote the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAuthorization {
    /// Nothing, or one line break.
    #[error("is empty: expected the value of the header Authorization, such as Bearer and a token")]
    Empty,
    /// More than [`HttpAuthorization::BYTES_MAX`].
    #[error("has {0} bytes: the value of the header Authorization has at most 8192")]
    Long(usize),
    /// A second line, a control character or one outside ASCII, at this byte.
    #[error(
        "has a line break, a control character or one outside ASCII at byte {0}: the value of the header \
         Authorization is one line of visible ASCII characters"
    )]
    Character(usize),
    /// Space at an end, which a server does not count to the value.
    #[error("begins or ends with a space")]
    Space,
}

impl HttpAuthorization {
    /// The longest value; servers take 8 KiB of one header or of all of them.
    pub const BYTES_MAX: usize = 8192;

    /// The value in a text, as a file with one line has it: one line break at its end is left out.
    ///
    /// # Errors
    /// The first rule that the text breaks.
    pub fn parse(text: &[u8]) -> Result<Self, InvalidAuthorization> {
        let value = text.strip_suffix(b"\n").unwrap_or(text);
        if value.is_empty() {
            return Err(InvalidAuthorization::Empty);
        }
        if value.len() > Self::BYTES_MAX {
            return Err(InvalidAuthorization::Long(value.len()));
        }
        // RFC 9110, 5.5, without the obsolete bytes and without tabs.
        let bad = value.iter().position(|byte| !matches!(byte, b' '..=b'~'));
        if let Some(at) = bad {
            return Err(InvalidAuthorization::Character(at));
        }
        if value.starts_with(b" ") || value.ends_with(b" ") {
            return Err(InvalidAuthorization::Space);
        }
        Ok(Self(value.iter().copied().map(char::from).collect()))
    }

    /// The value, for the request and for nothing else.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for HttpAuthorization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HttpAuthorization(…)")
    }
}

impl TryFrom<String> for HttpAuthorization {
    type Error = InvalidAuthorization;

    fn try_from(text: String) -> Result<Self, InvalidAuthorization> {
        Self::parse(text.as_bytes())
    }
}

impl From<HttpAuthorization> for String {
    fn from(value: HttpAuthorization) -> Self {
        value.0
    }
}

/// A source's header and the Secret that it was read from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceAuthorization {
    /// For messages.
    pub secret: SecretKey,
    /// The header's value.
    pub value: HttpAuthorization,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_one_line_of_visible_ascii_without_its_line_break() {
        for (text, value) in [
            ("Bearer abc", "Bearer abc"),
            ("Basic dXNlcjpwYXNz\n", "Basic dXNlcjpwYXNz"),
            ("Digest a=\"b c\", d=~!", "Digest a=\"b c\", d=~!"),
            ("x", "x"),
        ] {
            let parsed = HttpAuthorization::parse(text.as_bytes()).unwrap();
            assert_eq!(parsed.reveal(), value);
        }
        let longest = "x".repeat(HttpAuthorization::BYTES_MAX);
        assert!(HttpAuthorization::parse(longest.as_bytes()).is_ok());
        assert!(HttpAuthorization::parse(format!("{longest}\n").as_bytes()).is_ok());
    }

    #[test]
    fn what_could_end_the_header_or_is_no_value_is_refused_and_not_quoted() {
        use InvalidAuthorization::{Character, Empty, Long, Space};
        let long = format!("hunter2{}", "x".repeat(HttpAuthorization::BYTES_MAX));
        for (text, error) in [
            ("", Empty),
            ("\n", Empty),
            ("hunter2\n\n", Character(7)),
            ("hunter2\r\n", Character(7)),
            ("hunter2\r\nHost: other", Character(7)),
            ("hunter2\nHost: other\n", Character(7)),
            ("hunter2\tb", Character(7)),
            ("hunter2\0", Character(7)),
            ("hunter2\u{7f}", Character(7)),
            ("hunter2\u{e9}", Character(7)),
            (" hunter2", Space),
            ("hunter2 \n", Space),
            (&long, Long(long.len())),
        ] {
            let refused = HttpAuthorization::parse(text.as_bytes()).unwrap_err();
            assert_eq!(refused, error, "{text:.40?}");
            assert!(!refused.to_string().contains("hunter2"), "{refused}");
        }
        let bytes = HttpAuthorization::parse(b"Bearer \xff");
        assert_eq!(bytes, Err(Character(7)));
    }

    #[test]
    fn a_message_has_the_value_and_what_is_printed_for_debugging_has_not() {
        let authorization = SourceAuthorization {
            secret: SecretKey {
                name: "images".to_owned(),
                key: "authorization".to_owned(),
            },
            value: HttpAuthorization::parse(b"Bearer hunter2").unwrap(),
        };
        let shown = format!("{authorization:?} {authorization:#?}");
        assert!(shown.contains("images"), "{shown}");
        assert!(!shown.contains("hunter2"), "{shown}");
        let json = serde_json::to_string(&authorization).unwrap();
        assert!(json.contains("\"Bearer hunter2\""), "{json}");
        let read: SourceAuthorization = serde_json::from_str(&json).unwrap();
        assert_eq!(read, authorization);
        // A peer's message is held to the same rules, and its refusal does not quote it.
        let forged = json.replace("hunter2", "hunter2\\r\\nHost: other");
        let refused = serde_json::from_str::<SourceAuthorization>(&forged).unwrap_err();
        let refused = refused.to_string();
        assert!(refused.contains("byte 14"), "{refused}");
        assert!(!refused.contains("hunter2"), "{refused}");
    }
}
