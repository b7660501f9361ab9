//! Requests for a file, with the header Authorization where its source has one.
//!
//! # Guarantees
//! The header goes to the origin of the source's URL (scheme, host and port: RFC 6454, 4) and over https only. A
//! redirect within that origin keeps it. One to another origin does not, nor does any that follows, also back.

use bascule_types::SourceAuthorization;
use ureq::http::{HeaderName, HeaderValue, Response, StatusCode, Uri, header};
use ureq::{Agent, Body};

use super::REDIRECTS_MAX;
use super::redirect::{is_same_origin, redirect_target};

/// How a source is asked for its file.
pub(super) struct Requests<'a> {
    pub(super) agent: Agent,
    pub(super) url: &'a Uri,
    pub(super) authorization: Option<&'a SourceAuthorization>,
}

/// Why there is no response to go on with.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    /// Without a header of the source's own.
    #[error(transparent)]
    Http(#[from] ureq::Error),
    /// The server refused a request with the header.
    #[error("http status: {status}: the server refused the Authorization header of {secret}")]
    Refused { status: u16, secret: String },
    /// The server of another origin refused a request, which had no header.
    #[error(
        "http status: {status} from {host}, to which the URL redirects and which does not get the Authorization \
         header of {secret}"
    )]
    RefusedElsewhere {
        status: u16,
        host: String,
        secret: String,
    },
    /// A redirect to nowhere.
    #[error("http status: {0}, with a Location that is no http or https URL")]
    BadRedirect(u16),
    /// Checked at admission, and here again.
    #[error("an Authorization header is sent over https only")]
    InClear,
}

impl Requests<'_> {
    /// The response to a request with these headers; redirects are followed.
    pub(super) fn get(
        &self,
        headers: &[(HeaderName, &str)],
    ) -> Result<Response<Body>, RequestError> {
        match self.authorization {
            Some(authorization) => self.get_authorized(authorization, headers),
            None => {
                let request = self.agent.get(self.url);
                Ok(with_headers(request, headers).call()?)
            }
        }
    }

    /// Follows redirects itself: the client library would keep the header for another port of the same host, or
    /// drop it within the origin.
    fn get_authorized(
        &self,
        authorization: &SourceAuthorization,
        headers: &[(HeaderName, &str)],
    ) -> Result<Response<Body>, RequestError> {
        if self.url.scheme_str() != Some("https") {
            return Err(RequestError::InClear);
        }
        let mut url = self.url.clone();
        let mut at_home = true;
        for _ in 0..=REDIRECTS_MAX {
            let request = self.agent.get(&url).config().max_redirects(0).build();
            let mut request = with_headers(request, headers);
            if at_home {
                request = request.header(header::AUTHORIZATION, header_value(authorization)?);
            }
            let refused = |error| refusal(error, authorization, (!at_home).then_some(&url));
            let response = request.call().map_err(refused)?;
            let status = response.status();
            if !status.is_redirection() {
                return Ok(response);
            }
            let location = response.headers().get(header::LOCATION);
            let location = location.and_then(|location| location.to_str().ok());
            let target = location.and_then(|location| redirect_target(&url, location));
            url = target.ok_or(RequestError::BadRedirect(status.as_u16()))?;
            at_home = at_home && is_same_origin(self.url, &url);
        }
        Err(ureq::Error::TooManyRedirects.into())
    }
}

fn with_headers<T>(
    mut request: ureq::RequestBuilder<T>,
    headers: &[(HeaderName, &str)],
) -> ureq::RequestBuilder<T> {
    for (name, value) in headers {
        request = request.header(name, *value);
    }
    request
}

/// Marked so that what prints headers leaves it out.
fn header_value(authorization: &SourceAuthorization) -> Result<HeaderValue, ureq::Error> {
    let mut value = HeaderValue::from_str(authorization.value.reveal())
        .map_err(|error| ureq::Error::Http(error.into()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// `elsewhere` is the URL of another origin that was requested.
fn refusal(
    error: ureq::Error,
    authorization: &SourceAuthorization,
    elsewhere: Option<&Uri>,
) -> RequestError {
    let ureq::Error::StatusCode(status) = error else {
        return RequestError::Http(error);
    };
    let refused = [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN];
    if !refused.iter().any(|code| code.as_u16() == status) {
        return RequestError::Http(error);
    }
    let secret = authorization.secret.to_string();
    match elsewhere.and_then(Uri::host) {
        None => RequestError::Refused { status, secret },
        Some(host) => RequestError::RefusedElsewhere {
            status,
            host: host.to_owned(),
            secret,
        },
    }
}

#[cfg(test)]
mod tests;
