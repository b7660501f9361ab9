//! URLs of image sources, as people may read them.

use std::fmt;

/// A URL without user, password and query, which may hold a signature: for logs, conditions and errors.
#[derive(Clone, Copy)]
pub struct RedactedUrl<'a>(pub &'a str);

impl fmt::Display for RedactedUrl<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, rest) = self.0.split_once("://").unwrap_or(("", self.0));
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let host = authority.rsplit('@').next().unwrap_or_default();
        let path_end = path.find(['?', '#']).unwrap_or(path.len());
        let (path, query) = path.split_at(path_end);
        let hidden = if query.is_empty() { "" } else { "?…" };
        if scheme.is_empty() {
            write!(f, "{host}{path}{hidden}")
        } else {
            write!(f, "{scheme}://{host}{path}{hidden}")
        }
    }
}

/// The same: a log line of a structure must not show more than a message does.
impl fmt::Debug for RedactedUrl<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redacted_url_keeps_scheme_host_and_path() {
        for (url, shown) in [
            (
                "https://u:p@host:8080/a/b?sig=1#x",
                "https://host:8080/a/b?…",
            ),
            ("http://host", "http://host"),
            ("http://host?sig=1", "http://host?…"),
            ("https://u:p@ss@host/a", "https://host/a"),
            ("http://[::1]:80/a", "http://[::1]:80/a"),
            ("u:p@host/a", "host/a"),
        ] {
            assert_eq!(RedactedUrl(url).to_string(), shown);
        }
    }
}
