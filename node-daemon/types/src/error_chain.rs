//! Errors as one line of text.

use std::error::Error;
use std::fmt::Write as _;

/// `error` and its sources in one line, separated by `: `.
#[must_use]
pub fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Writing to a string cannot fail.
        write!(text, ": {cause}").ok();
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("read block 7")]
    struct ReadError(#[source] std::io::Error);

    #[test]
    fn an_error_chain_names_the_error_and_every_source() {
        let error = ReadError(std::io::Error::other("the device is gone"));
        assert_eq!(error_chain(&error), "read block 7: the device is gone");
    }
}
