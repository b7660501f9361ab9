//! The fetcher as a process of its own.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// The fetcher's parent: hands it a job that names this shell as the parent, and waits for it.
const PARENT: &str = r#"printf '%s%d}' "$1" $$ | "$0" fetch >/dev/null; true"#;

/// A job without its last field, the parent's process id.
fn job(url: &str) -> String {
    format!(
        r#"{{"url":"{url}","limit":{{"role":"Data","disk":1048576}},"ca_bundle":null,
        "site":{{"allow":["127.0.0.0/8"],"proxy":null,"no_proxy":null,"ca_bundle":null}},"parent":"#
    )
}

/// The same with a header and the authority of its server.
fn authorized_job(url: &str, authority: &bascule_pki::Authority) -> String {
    let authority = serde_json::to_string(authority.certificate_pem()).unwrap();
    let header = r#""authorization":{"secret":{"name":"images","key":"authorization"},"value":"Bearer hunter2"}"#;
    job(url).replacen(
        r#""ca_bundle":null"#,
        &format!("\"ca_bundle\":{authority},{header}"),
        1,
    )
}

/// While it fetches: command line and environment of a process can be read by others all the time.
#[test]
fn a_fetcher_has_the_header_neither_in_its_command_line_nor_in_its_environment_nor_in_its_errors() {
    let (authority, _) = bascule_pki::Authority::create("images").unwrap();
    let (told_tx, told_rx) = std::sync::mpsc::channel::<()>();
    let (asked_tx, asked_rx) = std::sync::mpsc::channel();
    let (port, served) = serve_tls(&authority, move |request| {
        asked_tx.send(request.to_owned()).unwrap();
        told_rx.recv().unwrap();
        "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_owned()
    });
    let job = authorized_job(&format!("https://localhost:{port}/image"), &authority);
    let fetcher = start(&job, Path::new("/nonexistent"));
    let request = asked_rx.recv_timeout(LIMIT).unwrap();
    // The control: it has the header, and it is the process that is looked at.
    let request = request.to_ascii_lowercase();
    assert!(
        request.contains("\r\nauthorization: bearer hunter2\r\n"),
        "{request}"
    );
    let read = |file: &str| {
        let bytes = fs::read(format!("/proc/{}/{file}", fetcher.id())).unwrap();
        String::from_utf8(bytes).unwrap()
    };
    let (command, environment) = (read("cmdline"), read("environ"));
    assert!(command.contains("fetch"), "{command}");
    assert!(environment.contains("SSL_CERT_FILE"), "{environment}");
    told_tx.send(()).unwrap();
    let end = fetcher.wait_with_output().unwrap();
    served.join().unwrap();
    let said = String::from_utf8(end.stderr).unwrap();
    assert!(
        said.contains("401") && said.contains("Secret \"images\""),
        "{said}"
    );
    for text in [command, environment, said] {
        assert!(!text.contains("hunter2"), "{text}");
    }
}

/// Found by reading: when an importer was killed, its fetcher went on with a source that had stalled, for ever.
#[test]
fn a_fetcher_does_not_outlive_the_import_that_was_killed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let job = job(&format!("http://127.0.0.1:{port}/image"));
    let mut parent = Command::new("sh")
        .args(["-c", PARENT, env!("CARGO_BIN_EXE_bascule-import"), &job])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let mut request = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    while request.read_line(&mut line).unwrap() > 2 {}
    // Half of the image, and then nothing.
    let begun = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\nConnection: close\r\n\r\nimage";
    stream.write_all(begun.as_bytes()).unwrap();
    parent.kill().unwrap();
    parent.wait().unwrap();
    // Without its end, the connection stays open.
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let end = stream.read(&mut [0; 1]);
    assert!(
        end.as_ref().is_ok_and(|count| *count == 0)
            || end
                .as_ref()
                .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset),
        "{end:?}"
    );
}

/// Only the authorities built into the program used to be trusted. OpenSSL's variable names the trust store here; without
/// it, that is where the host system has it.
#[test]
fn a_fetcher_trusts_the_authorities_of_its_node() {
    let folder = tempfile::tempdir().unwrap();
    let (nodes, _) = bascule_pki::Authority::create("node").unwrap();
    let (others, _) = bascule_pki::Authority::create("other").unwrap();
    let store = folder.path().join("store.pem");
    fs::write(&store, nodes.certificate_pem()).unwrap();
    for (signer, trusted) in [(&nodes, true), (&others, false)] {
        let (port, served) = serve_tls(signer, |_| OK.to_owned());
        let job = job(&format!("https://localhost:{port}/image"));
        let fetched = fetch_with(&job, &store);
        served.join().unwrap();
        let said = String::from_utf8_lossy(&fetched.stderr);
        assert_eq!(fetched.stdout == b"image", trusted, "{said}");
        assert_eq!(said.contains("certificate"), !trusted, "{said}");
    }
}

fn fetch_with(job: &str, trust_store: &Path) -> Output {
    start(job, trust_store).wait_with_output().unwrap()
}

fn start(job: &str, trust_store: &Path) -> Child {
    let mut fetcher = Command::new(env!("CARGO_BIN_EXE_bascule-import"))
        .arg("fetch")
        .env("SSL_CERT_FILE", trust_store)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = fetcher.stdin.take().unwrap();
    write!(input, "{job}{}}}", std::process::id()).unwrap();
    drop(input);
    fetcher
}

/// Answers one request over TLS, with a certificate for localhost by `authority`.
fn serve_tls(
    authority: &bascule_pki::Authority,
    answer: impl FnOnce(&str) -> String + Send + 'static,
) -> (u16, JoinHandle<()>) {
    let identity = authority.issue_operator(&["localhost".to_owned()]).unwrap();
    let chain = CertificateDer::pem_slice_iter(identity.certificate_pem.as_bytes());
    let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain.collect::<Result<_, _>>().unwrap(), key)
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = move || {
        let (stream, _) = listener.accept().unwrap();
        let connection = rustls::ServerConnection::new(Arc::new(config)).unwrap();
        let mut stream = rustls::StreamOwned::new(connection, stream);
        let mut request = [0; 4096];
        // A client that does not trust the certificate ends here.
        if let Ok(count @ 1..) = stream.read(&mut request) {
            let request = String::from_utf8_lossy(&request[..count]);
            stream.write_all(answer(&request).as_bytes()).unwrap();
            stream.conn.send_close_notify();
            stream.flush().unwrap();
        }
    };
    let thread = std::thread::Builder::new().name("server".to_owned());
    (port, thread.spawn(serve).unwrap())
}

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nimage";
const LIMIT: Duration = Duration::from_secs(60);
