//! Where a redirect leads, and whether it leaves the origin.

use ureq::http::Uri;

/// What a Location (RFC 9110, 10.2.2) names, read from `base` (RFC 3986, 5.2); none for one that is no http or
/// https URL.
pub(super) fn redirect_target(base: &Uri, location: &str) -> Option<Uri> {
    let scheme = base.scheme_str()?;
    let authority = base.authority()?.as_str();
    let text = if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if has_scheme(location) {
        location.to_owned()
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.is_empty() || location.starts_with('?') || location.starts_with('#') {
        format!("{scheme}://{authority}{}{location}", base.path())
    } else {
        let path = join_path(base.path(), location);
        format!("{scheme}://{authority}{path}")
    };
    let target: Uri = text.parse().ok()?;
    let known = matches!(target.scheme_str(), Some("http" | "https"));
    (known && target.host().is_some()).then_some(target)
}

/// Whether both have the same scheme, host and port.
pub(super) fn is_same_origin(one: &Uri, other: &Uri) -> bool {
    origin(one).is_some_and(|origin_of_one| Some(origin_of_one) == origin(other))
}

fn origin(url: &Uri) -> Option<(&str, String, u16)> {
    let scheme = url.scheme_str()?;
    let default = match scheme {
        "https" => 443,
        "http" => 80,
        _ => return None,
    };
    let port = match url.authority()?.port() {
        // A port that is no number: of no origin.
        Some(port) => port.as_str().parse().ok()?,
        None => default,
    };
    Some((scheme, url.host()?.to_ascii_lowercase(), port))
}

/// Whether a reference begins with a scheme (RFC 3986, 3.1) and not with a path.
fn has_scheme(location: &str) -> bool {
    location.split_once(':').is_some_and(|(scheme, _)| {
        scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
    })
}

/// A path relative to the folder of another one, without dot segments (RFC 3986, 5.2.3 and 5.2.4).
fn join_path(base: &str, relative: &str) -> String {
    let path_end = relative.find(['?', '#']).unwrap_or(relative.len());
    let (relative, rest) = relative.split_at(path_end);
    let folder = base.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut segments: Vec<&str> = folder.split('/').skip(1).collect();
    for segment in relative.split('/') {
        match segment {
            "." => {}
            ".." => drop(segments.pop()),
            other => segments.push(other),
        }
    }
    // The folder itself.
    if matches!(relative.rsplit('/').next(), Some("." | "..")) {
        segments.push("");
    }
    format!("/{}{rest}", segments.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(location: &str) -> Option<String> {
        let base: Uri = "https://images.example:8443/a/b?c=d".parse().unwrap();
        redirect_target(&base, location).map(|target| target.to_string())
    }

    #[test]
    fn a_location_is_read_from_the_url_that_redirects() {
        for (location, wanted) in [
            ("https://other.example/x", "https://other.example/x"),
            ("http://other.example:80/x?y", "http://other.example:80/x?y"),
            ("//other.example/x", "https://other.example/x"),
            ("/x/y?z", "https://images.example:8443/x/y?z"),
            ("x", "https://images.example:8443/a/x"),
            (
                "x?u=http://other",
                "https://images.example:8443/a/x?u=http://other",
            ),
            ("./x/../y", "https://images.example:8443/a/y"),
            ("../x", "https://images.example:8443/x"),
            ("../../../x", "https://images.example:8443/x"),
            ("..", "https://images.example:8443/"),
            ("?x", "https://images.example:8443/a/b?x"),
            ("", "https://images.example:8443/a/b"),
        ] {
            assert_eq!(target(location).as_deref(), Some(wanted), "{location}");
        }
        for none in [
            "ftp://other/x",
            "file:/etc/passwd",
            "mailto:a@b",
            "https://",
            "/a b",
        ] {
            assert_eq!(target(none), None, "{none}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let home: Uri = "https://images.example/a".parse().unwrap();
        for (other, same) in [
            ("https://images.example/b?c", true),
            ("https://images.example:443/a", true),
            ("https://IMAGES.example/a", true),
            ("https://user:password@images.example/a", true),
            ("http://images.example/a", false),
            ("http://images.example:443/a", false),
            ("https://images.example:8443/a", false),
            ("https://images.example.other/a", false),
            ("https://images.example@other.example/a", false),
            ("https://example/a", false),
            ("/a", false),
        ] {
            let other: Uri = other.parse().unwrap();
            assert_eq!(is_same_origin(&home, &other), same, "{other}");
        }
        let relative: Uri = "/a".parse().unwrap();
        assert!(!is_same_origin(&relative, &relative));
    }
}
