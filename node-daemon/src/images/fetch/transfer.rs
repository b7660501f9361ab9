//! The bytes of an image, over as many connections as it takes.
//!
//! A connection that breaks, or that brings nothing for a while, is followed by another one, which asks for the
//! rest of the same file: RFC 9110, 13.1.5 (If-Range) and 14.2 (Range). What the file is, its strong entity tag
//! says (8.8.3). Without one, or when the file has changed in the meantime, the fetch fails, and the next attempt
//! begins at the beginning: halves of two files would fail the hash, after all of it was fetched.

use std::io::{self, Read};
use std::time::Duration;

use anyhow::{Context, Result};
use bascule_types::RedactedUrl;
use ureq::BodyReader;
use ureq::http::{HeaderMap, StatusCode, header};

use super::requests::{RequestError, Requests};

/// The image, as a reader.
pub(super) struct Transfer<'a> {
    requests: Requests<'a>,
    body: BodyReader<'static>,
    /// The length of the file as its server has announced it.
    length: Option<u64>,
    /// The file's strong entity tag; none for one that cannot be asked for the rest of.
    tag: Option<String>,
    /// Bytes that have come.
    done: u64,
    /// Before the first further connection; twice as long before each one that follows without any byte in between.
    pause: Duration,
    /// Further connections so far.
    resumed: u32,
    /// Of these, the last ones without any byte.
    fruitless: u32,
}

/// Why there is no rest to go on with.
enum NoRest {
    /// Another attempt may have it.
    Yet(io::Error),
    /// The server does not give it.
    Ever(String),
}

impl<'a> Transfer<'a> {
    /// Requests the file. `shown` is its URL for messages.
    pub(super) fn begin(
        requests: Requests<'a>,
        shown: &RedactedUrl<'_>,
        pause: Duration,
    ) -> Result<Self> {
        let response = requests
            .get(&[(header::ACCEPT_ENCODING, "identity")])
            .with_context(|| format!("fetch {shown}"))?;
        let whole = response.status() == StatusCode::OK;
        let tag = strong_tag(response.headers()).filter(|_| whole);
        let body = response.into_body();
        let length = body.content_length();
        Ok(Self {
            requests,
            body: body.into_with_config().limit(u64::MAX).reader(),
            length,
            tag,
            done: 0,
            pause,
            resumed: 0,
            fruitless: 0,
        })
    }

    /// The length in bytes that the server has announced.
    pub(super) const fn length(&self) -> Option<u64> {
        self.length
    }

    /// Goes on with another connection after `broken`, or fails with the last error.
    fn resume(&mut self, broken: io::Error) -> io::Result<()> {
        let Some(tag) = self.tag.clone() else {
            return Err(broken);
        };
        let mut last = broken;
        while self.fruitless < FRUITLESS_MAX && self.resumed < RESUMED_MAX {
            std::thread::sleep(self.pause * 2_u32.pow(self.fruitless));
            self.fruitless += 1;
            self.resumed += 1;
            match self.rest(&tag) {
                Ok(body) => {
                    self.body = body;
                    return Ok(());
                }
                Err(NoRest::Yet(error)) => last = error,
                Err(NoRest::Ever(why)) => {
                    let done = self.done;
                    let message = format!("{last}, after {done} bytes; not resumed: {why}");
                    return Err(io::Error::new(last.kind(), message));
                }
            }
        }
        Err(last)
    }

    fn rest(&self, tag: &str) -> Result<BodyReader<'static>, NoRest> {
        let range = format!("bytes={}-", self.done);
        let wanted = [
            (header::ACCEPT_ENCODING, "identity"),
            (header::RANGE, range.as_str()),
            (header::IF_RANGE, tag),
        ];
        let response = self.requests.get(&wanted).map_err(NoRest::of)?;
        let headers = response.headers();
        if response.status() != StatusCode::PARTIAL_CONTENT {
            let why = if strong_tag(headers).as_deref() == Some(tag) {
                "the server gives no ranges"
            } else {
                "the file has changed"
            };
            return Err(NoRest::Ever(why.to_owned()));
        }
        let range = headers.get(header::CONTENT_RANGE);
        let range = range.and_then(|range| range.to_str().ok());
        if !range.is_some_and(|range| is_rest(range, self.done, self.length)) {
            let why = format!(
                "the server gives another range: {}",
                range.unwrap_or("none")
            );
            return Err(NoRest::Ever(why));
        }
        if headers.contains_key(header::ETAG) && strong_tag(headers).as_deref() != Some(tag) {
            return Err(NoRest::Ever("the file has changed".to_owned()));
        }
        let body = response.into_body().into_with_config();
        Ok(body.limit(u64::MAX).reader())
    }
}

impl Read for Transfer<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.body.read(into) {
                Ok(count) => {
                    self.done += count as u64;
                    if count > 0 {
                        self.fruitless = 0;
                    }
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => self.resume(error)?,
            }
        }
    }
}

impl NoRest {
    fn of(error: RequestError) -> Self {
        match error {
            // Too many requests, or a timeout, pass as errors of the server do.
            RequestError::Http(ureq::Error::StatusCode(code))
                if code < 500 && code != 408 && code != 429 =>
            {
                Self::Ever(format!("http status: {code}"))
            }
            RequestError::Http(other) => Self::Yet(other.into_io()),
            other => Self::Ever(other.to_string()),
        }
    }
}

/// The entity tag, unless it is weak: that of a file that may differ in some bytes.
fn strong_tag(headers: &HeaderMap) -> Option<String> {
    let tag = headers.get(header::ETAG)?.to_str().ok()?;
    tag.starts_with('"').then(|| tag.to_owned())
}

/// Whether a Content-Range is that of all bytes from `done` on, of a file of `length` bytes where that is known:
/// `bytes 5-9/10` or `bytes 5-9/*`.
fn is_rest(range: &str, done: u64, length: Option<u64>) -> bool {
    let parts = || {
        let (from_to, all) = range.strip_prefix("bytes ")?.split_once('/')?;
        let (from, to) = from_to.split_once('-')?;
        let last: u64 = to.parse().ok()?;
        let all: Option<u64> = match all {
            "*" => None,
            all => Some(all.parse().ok()?),
        };
        Some((from.parse().ok()?, last.checked_add(1)?, all))
    };
    let Some((from, end, all)): Option<(u64, u64, Option<u64>)> = parts() else {
        return false;
    };
    let wanted = length.or(all);
    from == done
        && end > done
        && all.is_none_or(|all| Some(all) == wanted)
        && wanted.is_none_or(|all| end == all)
}

/// Between the break of a connection and the next one.
pub(super) const PAUSE: Duration = Duration::from_secs(1);
/// Connections in a row that bring nothing: with their pauses, half a minute and the time that they take.
const FRUITLESS_MAX: u32 = 5;
/// Connections of one import (guess): a source that breaks this often is not worth more.
const RESUMED_MAX: u32 = 100;

#[cfg(test)]
mod tests;
