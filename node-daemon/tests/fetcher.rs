//! The fetcher as a process of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::Duration;

/// The fetcher's parent: hands it a job that names this shell as the parent, and waits for it.
const PARENT: &str = r#"printf '%s%d}' "$1" $$ | "$0" fetch >/dev/null; true"#;

/// Found by reading: when an importer was killed, its fetcher went on with a source that had stalled, for ever.
#[test]
fn a_fetcher_does_not_outlive_the_import_that_was_killed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let job = format!(
        r#"{{"url":"http://127.0.0.1:{port}/image","limit":{{"role":"Data","disk":1048576}},
        "ca_bundle":null,"site":{{"allow":["127.0.0.0/8"],"proxy":null,"no_proxy":null,"ca_bundle":null}},"parent":"#
    );
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
