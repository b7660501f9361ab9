//! Servers on loopback, over TLS, of which each port is an origin of its own.

use std::io::Read;
use std::time::Duration;

use anyhow::Result;
use bascule_pki::Authority;
use bascule_types::{HttpAuthorization, RedactedUrl, SecretKey};

use super::*;
use crate::images::fetch::tests::{OK, job, serve, site};
use crate::images::fetch::tls_server::TlsServer;
use crate::images::fetch::transfer::Transfer;
use crate::images::fetch::{FetchJob, agent, fetch_to};

const HALF: &str =
    "HTTP/1.1 200 OK\r\nETag: \"a\"\r\nContent-Length: 10\r\nConnection: close\r\n\r\n01234";
const REST: &str = "HTTP/1.1 206 Partial Content\r\nETag: \"a\"\r\nContent-Range: bytes 5-9/10\r\n\
                    Content-Length: 5\r\nConnection: close\r\n\r\n56789";
/// In lower case, as the server notes it.
const HEADER: &str = "\r\nauthorization: bearer hunter2\r\n";
const STALL: Duration = Duration::from_secs(20);

fn authorization() -> SourceAuthorization {
    SourceAuthorization {
        secret: SecretKey {
            name: "images".to_owned(),
            key: "authorization".to_owned(),
        },
        value: HttpAuthorization::parse(b"Bearer hunter2").unwrap(),
    }
}

fn authorized(url: &str, authority: &Authority) -> FetchJob {
    FetchJob {
        ca_bundle: Some(authority.certificate_pem().to_owned()),
        authorization: Some(authorization()),
        ..job(url, site(&["127.0.0.0/8", "::1/128"]))
    }
}

/// Without pauses between connections.
fn fetched(job: &FetchJob) -> Result<String> {
    let url: Uri = job.url.parse()?;
    let requests = Requests {
        agent: agent(&job.site, job.ca_bundle.as_deref(), STALL)?,
        url: &url,
        authorization: job.authorization.as_ref(),
    };
    let shown = RedactedUrl(&job.url);
    let mut transfer = Transfer::begin(requests, &shown, Duration::ZERO)?;
    let mut image = String::new();
    transfer.read_to_string(&mut image)?;
    Ok(image)
}

fn redirect(status: u16, to: &str) -> String {
    format!(
        "HTTP/1.1 {status} Elsewhere\r\nLocation: {to}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )
}

fn failure(status: u16) -> String {
    format!("HTTP/1.1 {status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
}

/// For each request, whether it had the header.
fn had_header(server: &TlsServer) -> Vec<bool> {
    let requests = server.requests();
    let had = requests.iter().map(|head| head.contains(HEADER));
    // In any other form it would be a leak, too.
    let told = requests.iter().map(|head| head.contains("hunter2"));
    assert!(had.clone().eq(told), "{requests:?}");
    had.collect()
}

fn authority() -> Authority {
    Authority::create("images").unwrap().0
}

#[test]
fn the_servers_first_request_has_the_header_and_a_source_without_one_sends_none() {
    let authority = authority();
    let server = TlsServer::start(&authority, &[OK, OK]);
    let with = authorized(&server.url(), &authority);
    assert_eq!(fetched(&with).unwrap(), "image");
    let without = FetchJob {
        authorization: None,
        ..with
    };
    assert_eq!(fetched(&without).unwrap(), "image");
    assert_eq!(had_header(&server), [true, false]);
}

#[test]
fn a_broken_transfer_is_resumed_with_the_header() {
    let authority = authority();
    let server = TlsServer::start(&authority, &[HALF, REST]);
    let job = authorized(&server.url(), &authority);
    assert_eq!(fetched(&job).unwrap(), "0123456789");
    assert_eq!(had_header(&server), [true, true]);
    let requests = server.requests();
    assert!(
        requests[1].contains("\r\nrange: bytes=5-\r\n"),
        "{requests:?}"
    );
}

#[test]
fn a_redirect_within_the_origin_keeps_the_header() {
    let authority = authority();
    let server = TlsServer::begin(&authority);
    let absolute = format!("https://LOCALHOST:{}/third", server.port);
    let answers = [
        redirect(302, "/second?part=1"),
        redirect(307, &absolute),
        redirect(301, "fourth"),
        OK.to_owned(),
    ];
    let server = server.answering(&answers.each_ref().map(String::as_str));
    let job = authorized(&server.url(), &authority);
    assert_eq!(fetched(&job).unwrap(), "image");
    assert_eq!(had_header(&server), [true; 4]);
    let requests = server.requests();
    let targets = requests.iter().map(|head| head.split(' ').nth(1).unwrap());
    let targets: Vec<&str> = targets.collect();
    assert_eq!(targets, ["/image", "/second?part=1", "/third", "/fourth"]);
}

/// Another port of the same host is another server, for whoever may open one there.
#[test]
fn a_redirect_to_another_port_goes_without_the_header_also_on_the_way_back_and_when_resumed() {
    let authority = authority();
    let home = TlsServer::begin(&authority);
    let back = redirect(302, &format!("https://localhost:{}/back", home.port));
    let other = TlsServer::start(&authority, &[HALF, &back]);
    let away = redirect(302, &other.url());
    let home = home.answering(&[&away, &away, REST]);
    let job = authorized(&home.url(), &authority);
    assert_eq!(fetched(&job).unwrap(), "0123456789");
    assert_eq!(had_header(&home), [true, true, false]);
    assert_eq!(had_header(&other), [false, false]);
}

#[test]
fn a_redirect_to_http_goes_without_the_header() {
    let authority = authority();
    let (port, served) = serve(OK);
    let away = redirect(308, &format!("http://localhost:{port}/image"));
    let home = TlsServer::start(&authority, &[&away]);
    let job = authorized(&home.url(), &authority);
    assert_eq!(fetched(&job).unwrap(), "image");
    assert_eq!(had_header(&home), [true]);
    let request = served.join().unwrap();
    assert!(!request.contains("hunter2"), "{request}");
    assert!(
        !request.to_lowercase().contains("authorization"),
        "{request}"
    );
}

/// The importer's own check, whatever the operator has sent.
#[test]
fn nothing_is_requested_with_the_header_over_http() {
    let authority = authority();
    let job = authorized("http://127.0.0.1:1/image", &authority);
    let error = format!("{:#}", fetched(&job).unwrap_err());
    assert!(error.ends_with("is sent over https only"), "{error}");
}

#[test]
fn a_refusal_names_the_secret_that_was_used_and_not_its_value() {
    let authority = authority();
    for status in [401, 403] {
        let server = TlsServer::start(&authority, &[&failure(status)]);
        let job = authorized(&server.url(), &authority);
        let error = format!("{:#}", fetch_to(&job, &mut Vec::new()).unwrap_err());
        let url = server.url();
        let wanted = format!(
            "fetch {url}: http status: {status}: the server refused the Authorization header of \
             key \"authorization\" of Secret \"images\""
        );
        assert_eq!(error, wanted);
    }
    let server = TlsServer::start(&authority, &[&failure(404)]);
    let job = authorized(&server.url(), &authority);
    let error = format!("{:#}", fetched(&job).unwrap_err());
    assert!(error.ends_with("http status: 404"), "{error}");
}

/// Whoever reads "refused" alone would look for the mistake in the Secret.
#[test]
fn a_refusal_behind_a_redirect_says_that_the_header_is_not_sent_there() {
    let authority = authority();
    let other = TlsServer::start(&authority, &[&failure(403)]);
    let home = TlsServer::start(&authority, &[&redirect(302, &other.url())]);
    let job = authorized(&home.url(), &authority);
    let error = format!("{:#}", fetched(&job).unwrap_err());
    let wanted =
        "http status: 403 from localhost, to which the URL redirects and which does not get";
    assert!(error.contains(wanted), "{error}");
    assert!(!error.contains("hunter2"), "{error}");
}

#[test]
fn a_header_that_is_no_longer_good_ends_a_resumed_transfer_with_the_secrets_name() {
    let authority = authority();
    let server = TlsServer::start(&authority, &[HALF, &failure(401)]);
    let job = authorized(&server.url(), &authority);
    let error = format!("{:#}", fetched(&job).unwrap_err());
    let wanted = "after 5 bytes; not resumed: http status: 401: the server refused";
    assert!(error.contains(wanted), "{error}");
    assert!(error.contains("Secret \"images\""), "{error}");
}

#[test]
fn redirects_have_an_end_and_a_place() {
    let authority = authority();
    let again = redirect(302, "/image");
    let most = REDIRECTS_MAX as usize;
    let server = TlsServer::start(&authority, &vec![again.as_str(); most + 2]);
    let job = authorized(&server.url(), &authority);
    let error = format!("{:#}", fetched(&job).unwrap_err());
    assert!(error.contains("too many redirects"), "{error}");
    assert_eq!(server.requests().len(), most + 1);
    for nowhere in [redirect(302, "file:///etc/passwd"), failure(304)] {
        let server = TlsServer::start(&authority, &[&nowhere]);
        let job = authorized(&server.url(), &authority);
        let error = format!("{:#}", fetched(&job).unwrap_err());
        assert!(error.contains("no http or https URL"), "{error}");
    }
}

/// Redirects that are followed here pass the same policy as those that the client library follows.
#[test]
fn a_redirect_of_an_authorized_source_to_a_forbidden_address_is_refused() {
    let authority = authority();
    let away = redirect(302, "https://169.254.169.254/latest/");
    let server = TlsServer::start(&authority, &[&away]);
    let job = authorized(&server.url(), &authority);
    let error = format!("{:#}", fetched(&job).unwrap_err());
    let refused = "169.254.169.254 is a link-local address";
    assert!(error.contains(refused), "{error}");
}

#[test]
fn the_proxy_does_not_see_the_header() {
    let authority = authority();
    let (port, served) = serve("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n");
    let mut job = authorized("https://images.example/image", &authority);
    job.site.proxy = Some(format!("http://user:secret@127.0.0.1:{port}"));
    let error = format!("{:#}", fetched(&job).unwrap_err());
    let request = served.join().unwrap();
    assert!(
        request.starts_with("CONNECT images.example:443 "),
        "{request}"
    );
    assert!(request.contains("Proxy-Authorization: "), "{request}");
    assert!(!request.contains("hunter2"), "{request}");
    assert!(!request.contains("\r\nAuthorization"), "{request}");
    // It is the proxy that refused.
    assert!(!error.contains("Secret"), "{error}");
}
