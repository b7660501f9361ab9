//! Servers on loopback that break off.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::JoinHandle;

use ureq::http::Uri;

use super::*;
use crate::images::fetch::tests::{job, site, spawn};
use crate::images::fetch::{FetchJob, agent};

const IMAGE: &str = "0123456789";
const HALF: &str = "HTTP/1.1 200 OK\r\nETag: \"a\"\r\nContent-Length: 10\r\n\r\n01234";
const REST: &str = "HTTP/1.1 206 Partial Content\r\nETag: \"a\"\r\nContent-Range: bytes 5-9/10\r\n\
                    Content-Length: 5\r\n\r\n56789";
const STALL: Duration = Duration::from_secs(2);

/// The head of a request.
fn head(stream: &TcpStream) -> String {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut head = String::new();
    while reader.read_line(&mut head).unwrap() > 2 {}
    head.to_ascii_lowercase()
}

/// Answers as many connections, and says what was requested on each.
fn serve(answers: &[&str]) -> (FetchJob, JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let answers: Vec<String> = answers.iter().map(|text| (*text).to_owned()).collect();
    let served = spawn(move || {
        let answer = |text: &String| {
            let (mut stream, _) = listener.accept().unwrap();
            let request = head(&stream);
            stream.write_all(text.as_bytes()).unwrap();
            request
        };
        answers.iter().map(answer).collect()
    });
    let url = format!("http://127.0.0.1:{port}/image");
    (job(&url, site(&["127.0.0.0/8"])), served)
}

fn fetched(job: &FetchJob) -> (String, Result<()>) {
    let url: Uri = job.url.parse().unwrap();
    let agent = agent(&job.site, None, STALL).unwrap();
    let shown = RedactedUrl(&job.url);
    let requests = Requests {
        agent,
        url: &url,
        authorization: None,
    };
    let mut transfer = Transfer::begin(requests, &shown, Duration::ZERO).unwrap();
    let mut image = Vec::new();
    let end = transfer.read_to_end(&mut image);
    let end = end.map(drop).context("fetch");
    (String::from_utf8(image).unwrap(), end)
}

/// What has come of an image that could not be fetched, why, and how many requests there were.
fn failed(answers: &[&str]) -> (String, String, usize) {
    let (job, served) = serve(answers);
    let (image, end) = fetched(&job);
    let error = format!("{:#}", end.unwrap_err());
    (image, error, served.join().unwrap().len())
}

#[test]
fn a_broken_connection_is_resumed_behind_what_has_come() {
    let (job, served) = serve(&[HALF, REST]);
    let (image, end) = fetched(&job);
    end.unwrap();
    assert_eq!(image, IMAGE);
    let requests = served.join().unwrap();
    assert!(!requests[0].contains("range"), "{requests:?}");
    for wanted in ["range: bytes=5-\r\n", "if-range: \"a\"\r\n"] {
        assert!(requests[1].contains(wanted), "{requests:?}");
    }
}

#[test]
fn a_chunked_file_without_a_length_is_resumed_too() {
    let half = "HTTP/1.1 200 OK\r\nETag: \"a\"\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n01234\r\n";
    let (job, served) = serve(&[half, REST]);
    let (image, end) = fetched(&job);
    end.unwrap();
    served.join().unwrap();
    assert_eq!(image, IMAGE);
}

/// The first connection stays open and brings nothing more.
#[test]
fn a_connection_that_stalls_is_left_for_another_one() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let served = spawn(move || {
        let mut stalled = Vec::new();
        loop {
            let (mut stream, _) = listener.accept().unwrap();
            if head(&stream).contains("if-range") {
                stream.write_all(REST.as_bytes()).unwrap();
                return stalled.len();
            }
            stream.write_all(HALF.as_bytes()).unwrap();
            stalled.push(stream);
        }
    });
    let url = format!("http://127.0.0.1:{port}/image");
    let (image, end) = fetched(&job(&url, site(&["127.0.0.0/8"])));
    end.unwrap();
    assert_eq!(image, IMAGE);
    assert_eq!(served.join().unwrap(), 1);
}

#[test]
fn a_stalled_connection_of_a_file_without_a_tag_fails() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (over_tx, over_rx) = std::sync::mpsc::channel::<()>();
    let served = spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        head(&stream);
        let half = HALF.replace("ETag", "X-Tag");
        stream.write_all(half.as_bytes()).unwrap();
        over_rx.recv().unwrap_err();
    });
    let url = format!("http://127.0.0.1:{port}/image");
    let (image, end) = fetched(&job(&url, site(&["127.0.0.0/8"])));
    drop(over_tx);
    served.join().unwrap();
    assert_eq!(image, "01234");
    let error = format!("{:#}", end.unwrap_err());
    assert!(error.contains("timeout"), "{error}");
}

#[test]
fn a_file_without_a_strong_tag_is_not_resumed() {
    for tag in ["X-Tag: \"a\"", "ETag: W/\"a\""] {
        let half = HALF.replace("ETag: \"a\"", tag);
        let (image, error, requests) = failed(&[&half]);
        assert_eq!((image.as_str(), requests), ("01234", 1), "{error}");
    }
}

/// Halves of two files are no image.
#[test]
fn a_file_that_has_changed_is_not_resumed() {
    let changed = "HTTP/1.1 200 OK\r\nETag: \"b\"\r\nContent-Length: 10\r\n\r\nabcdefghij";
    for (answer, why) in [
        (changed.to_owned(), "the file has changed"),
        (REST.replace("\"a\"", "\"b\""), "the file has changed"),
        (REST.replace("\"a\"", "W/\"a\""), "the file has changed"),
        (changed.replace("\"b\"", "\"a\""), "gives no ranges"),
        (
            REST.replace("5-9/10", "4-9/10"),
            "another range: bytes 4-9/10",
        ),
        (
            REST.replace("5-9/10", "5-9/11"),
            "another range: bytes 5-9/11",
        ),
        (
            REST.replace("Content-Range", "X-Range"),
            "another range: none",
        ),
        (
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_owned(),
            "http status: 404",
        ),
    ] {
        let (image, error, _) = failed(&[HALF, &answer]);
        assert_eq!(image, "01234", "{why}");
        let told = error.contains(why) && error.contains("after 5 bytes; not resumed");
        assert!(told, "{error}");
    }
}

#[test]
fn a_source_that_brings_nothing_more_is_given_up() {
    let busy = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n";
    let nothing = REST.trim_end_matches("56789");
    for answer in [busy, nothing] {
        let mut answers = vec![HALF];
        answers.extend([answer; FRUITLESS_MAX as usize]);
        let (image, _, requests) = failed(&answers);
        assert_eq!(
            (image.as_str(), requests),
            ("01234", 1 + FRUITLESS_MAX as usize)
        );
    }
}

#[test]
fn the_rest_is_fetched_from_allowed_addresses_only() {
    let redirect = "HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/latest/\r\n\
                    Content-Length: 0\r\nConnection: close\r\n\r\n";
    let mut answers = vec![HALF];
    answers.extend([redirect; FRUITLESS_MAX as usize]);
    let (image, error, _) = failed(&answers);
    assert_eq!(image, "01234");
    let refused = "169.254.169.254 is a link-local address";
    assert!(error.contains(refused), "{error}");
}

#[test]
fn a_content_range_is_that_of_the_rest_or_refused() {
    for (range, length, good) in [
        ("bytes 5-9/10", Some(10), true),
        ("bytes 5-9/10", None, true),
        ("bytes 5-9/*", Some(10), true),
        ("bytes 5-9/*", None, true),
        ("bytes 5-8/10", Some(10), false),
        ("bytes 5-8/10", None, false),
        ("bytes 5-9/11", Some(10), false),
        ("bytes 0-9/10", Some(10), false),
        ("bytes 5-4/10", Some(10), false),
        ("bytes 5-18446744073709551615/*", None, false),
        ("bytes */10", Some(10), false),
        ("5-9/10", Some(10), false),
        ("", None, false),
    ] {
        assert_eq!(is_rest(range, 5, length), good, "{range} of {length:?}");
    }
}
