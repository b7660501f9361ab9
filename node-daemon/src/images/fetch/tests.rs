//! The fetcher against servers on loopback, each of which serves one connection.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::thread::JoinHandle;

use bascule_types::{Bytes, DiskRole};

use super::tls_server::TlsServer;
use super::*;
use crate::images::is_final;

pub(super) const OK: &str =
    "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nimage";

pub(super) fn spawn<T: Send + 'static>(
    serve: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    let thread = std::thread::Builder::new().name("server".to_owned());
    thread.spawn(serve).unwrap()
}

/// Answers one connection with `answer`, and says what was requested.
pub(super) fn serve(answer: &str) -> (u16, JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let answer = answer.to_owned();
    let served = spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut request = String::new();
        while reader.read_line(&mut request).unwrap() > 2 {}
        stream.write_all(answer.as_bytes()).unwrap();
        request
    });
    (port, served)
}

pub(super) fn site(allow: &[&str]) -> SiteConfig {
    SiteConfig {
        allow: allow.iter().map(|range| (*range).to_owned()).collect(),
        ..SiteConfig::default()
    }
}

fn fetched(url: &str, site: SiteConfig) -> Result<Vec<u8>> {
    let mut image = Vec::new();
    fetch_to(&job(url, site), &mut image).map(|()| image)
}

pub(super) fn job(url: &str, site: SiteConfig) -> FetchJob {
    FetchJob {
        parent: std::process::id(),
        url: url.to_owned(),
        limit: LengthLimit {
            role: DiskRole::Data,
            disk: Bytes::mib(1),
        },
        ca_bundle: None,
        authorization: None,
        site,
    }
}

fn error(url: &str, site: SiteConfig) -> String {
    format!("{:#}", fetched(url, site).unwrap_err())
}

#[test]
fn an_image_is_fetched_from_an_allowed_address() {
    let (port, served) = serve(OK);
    let url = format!("http://127.0.0.1:{port}/image");
    assert_eq!(fetched(&url, site(&["127.0.0.0/8"])).unwrap(), b"image");
    assert!(served.join().unwrap().starts_with("GET /image HTTP/1.1"));
}

/// Fetches an image of which more is announced than comes.
fn announced(length: u64, image: &str) -> (Vec<u8>, Result<()>) {
    let (port, served) = serve(&format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{image}"
    ));
    let url = format!("http://127.0.0.1:{port}/image");
    let mut fetched = Vec::new();
    let end = fetch_to(&job(&url, site(&["127.0.0.0/8"])), &mut fetched);
    served.join().unwrap();
    (fetched, end)
}

/// Without the announced length, hundreds of MiB were fetched and then refused.
#[test]
fn an_image_that_is_announced_as_too_long_is_refused_before_it_is_fetched() {
    let raw = "image".repeat(200);
    let disk = 1 << 20;
    let (image, end) = announced(disk + 1, &raw);
    assert!(image.is_empty());
    let error = end.unwrap_err();
    assert!(is_final(&error));
    let text = error.to_string();
    assert_eq!(text, "the image has 1048577 bytes, and the disk 1048576");
}

/// Only a raw image is as long as its disk.
#[test]
fn a_packed_image_may_be_announced_as_longer_than_its_disk_up_to_a_limit() {
    let max = bascule_image::packed_bytes_max(1 << 20);
    let (image, end) = announced(max + 1, "BZh");
    assert!(image.is_empty());
    let error = end.unwrap_err();
    assert!(is_final(&error));
    assert!(error.to_string().contains(&max.to_string()), "{error}");
    // A bzip2 file is refused by the writer, by its name.
    let (image, end) = announced((1 << 20) + 1, &format!("BZh{raw}", raw = "i".repeat(600)));
    assert!(image.starts_with(b"BZh"));
    assert!(!is_final(&end.unwrap_err()));
}

#[test]
fn a_redirect_to_a_forbidden_address_is_refused() {
    let redirect = "HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/latest/\r\n\
                    Content-Length: 0\r\nConnection: close\r\n\r\n";
    let (port, served) = serve(redirect);
    let url = format!("http://127.0.0.1:{port}/image");
    let error = error(&url, site(&["127.0.0.0/8"]));
    served.join().unwrap();
    assert!(
        error.contains("169.254.169.254 is a link-local address"),
        "{error}"
    );
}

#[test]
fn a_name_that_resolves_to_a_forbidden_address_is_refused() {
    let error = error("http://localhost:1/image", site(&[]));
    assert!(error.contains("localhost is a loopback address"), "{error}");
}

#[test]
fn the_proxy_is_asked_and_need_not_be_an_allowed_source() {
    let answer = format!("HTTP/1.1 200 Connection established\r\n\r\n{OK}");
    let (port, served) = serve(&answer);
    let site = SiteConfig {
        proxy: Some(format!("http://user:secret@127.0.0.1:{port}")),
        ..site(&[])
    };
    assert_eq!(
        fetched("http://images.example/image", site).unwrap(),
        b"image"
    );
    let request = served.join().unwrap();
    assert!(
        request.starts_with("CONNECT images.example:80 HTTP/1.1"),
        "{request}"
    );
    // "user:secret"
    assert!(
        request.contains("Proxy-Authorization: Basic dXNlcjpzZWNyZXQ="),
        "{request}"
    );
}

#[test]
fn a_forbidden_address_is_refused_behind_a_proxy_too() {
    let site = SiteConfig {
        proxy: Some("http://127.0.0.1:1".to_owned()),
        ..site(&[])
    };
    for url in [
        "http://169.254.169.254/latest/",
        "http://[fd00:ec2::254]/latest/",
    ] {
        let error = error(url, site.clone());
        assert!(error.contains("not allowed as a source"), "{error}");
    }
}

#[test]
fn a_host_of_no_proxy_is_reached_directly() {
    let (port, served) = serve(OK);
    let site = SiteConfig {
        proxy: Some("http://127.0.0.1:1".to_owned()),
        no_proxy: Some("other.example, 127.0.0.1".to_owned()),
        ..site(&["127.0.0.0/8"])
    };
    let url = format!("http://127.0.0.1:{port}/image");
    assert_eq!(fetched(&url, site).unwrap(), b"image");
    served.join().unwrap();
}

#[test]
fn a_proxy_that_is_none_is_named_without_its_password() {
    for bad in [
        "socks5://user:secret@host:1",
        "ftp://user:secret@host",
        "http://",
    ] {
        let site = SiteConfig {
            proxy: Some(bad.to_owned()),
            ..site(&[])
        };
        let error = error("http://images.example/image", site);
        assert!(error.contains("the image proxy"), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
}

#[test]
fn a_name_of_the_clusters_dns_is_refused_with_that_reason() {
    for host in [
        "images.shop.svc",
        "images.shop.svc.cluster.local",
        "IMAGES.shop.SVC.",
        "pod.cluster.local",
    ] {
        let error = error(&format!("http://{host}/image"), site(&[]));
        assert!(error.contains("the cluster's DNS"), "{error}");
    }
    assert!(!is_cluster_name("svc.example.org"));
}

#[test]
fn no_error_shows_user_password_or_query() {
    let (port, served) = serve("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
    let url = format!("http://user:secret@127.0.0.1:{port}/image?signature=abc");
    let error = error(&url, site(&["127.0.0.0/8"]));
    let request = served.join().unwrap();
    // The server still gets them.
    assert!(request.starts_with("GET /image?signature=abc"), "{request}");
    assert!(
        request
            .to_lowercase()
            .contains("authorization: basic dxnlcjpzzwnyzxq="),
        "{request}"
    );
    assert!(error.contains("404"), "{error}");
    for secret in ["secret", "user", "abc"] {
        assert!(!error.contains(secret), "{error}");
    }
}

#[test]
fn a_source_with_a_private_authority_is_fetched_with_that_in_the_bundle_and_not_without() {
    let (authority, _) = bascule_pki::Authority::create("images").unwrap();
    for trusted in [true, false] {
        let server = TlsServer::start(&authority, &[OK]);
        let pem = authority.certificate_pem().to_owned();
        let site = SiteConfig {
            ca_bundle: trusted.then_some(pem),
            ..site(&["127.0.0.0/8"])
        };
        let result = fetched(&server.url(), site);
        assert_eq!(result.is_ok_and(|image| image == b"image"), trusted);
    }
}

#[test]
fn a_source_brings_its_own_authority_beside_the_sites() {
    let (site_authority, _) = bascule_pki::Authority::create("site").unwrap();
    let (own_authority, _) = bascule_pki::Authority::create("images").unwrap();
    for signer in [&site_authority, &own_authority] {
        let server = TlsServer::start(signer, &[OK]);
        let site = SiteConfig {
            ca_bundle: Some(site_authority.certificate_pem().to_owned()),
            ..site(&["127.0.0.0/8"])
        };
        let job = FetchJob {
            ca_bundle: Some(own_authority.certificate_pem().to_owned()),
            ..job(&server.url(), site)
        };
        let mut image = Vec::new();
        fetch_to(&job, &mut image).unwrap();
        assert_eq!(image, b"image");
    }
}

#[test]
fn a_ca_bundle_without_a_certificate_is_refused() {
    for bad in ["", "no certificate"] {
        let of_site = roots(Some(bad), None).unwrap_err().to_string();
        assert!(of_site.contains("holds no certificate"), "{of_site}");
        let of_source = roots(None, Some(bad)).unwrap_err().to_string();
        assert_eq!(of_source, "http.caBundle holds no certificate");
    }
}
