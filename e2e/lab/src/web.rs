//! The lab's web server: kernels, initramfs and disk images as a VirtualMachine's sources.
//!
//! It serves the files of one directory, by name, to GET and HEAD; nothing else.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::command::named_thread;
use crate::image::sha256_file;
use crate::lab::Lab;
use crate::names::WEB_PORT;

/// A published file, as the `http` source of a VirtualMachine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// URL, reachable from every node.
    pub url: String,
    /// SHA-256 of it, hexadecimal.
    pub sha256: String,
    /// Size in bytes.
    pub bytes: u64,
}

impl Lab {
    /// Offers a file to the lab's machines under `name`.
    pub fn publish(&self, name: &str, file: &Path) -> Result<Source> {
        let target = self.paths().web().join(name);
        std::fs::copy(file, &target).with_context(|| format!("publish {}", file.display()))?;
        let (sha256, bytes) = sha256_file(&target)?;
        let hub = SocketAddr::new(self.family().hub(), WEB_PORT);
        let url = format!("http://{hub}/{name}");
        Ok(Source { url, sha256, bytes })
    }
}

/// What `lab serve` does; it returns only with an error.
pub fn serve(dir: &Path, address: &str) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
    for stream in listener.incoming() {
        let stream = stream.context("accept a client")?;
        let dir = dir.to_owned();
        named_thread("client", move || {
            if let Err(error) = answer(&stream, &dir) {
                eprintln!("{error:#}");
            }
        })?;
    }
    Ok(())
}

fn answer(stream: &TcpStream, dir: &Path) -> Result<()> {
    stream
        .set_read_timeout(Some(CLIENT_DEADLINE))
        .context("set a deadline")?;
    stream
        .set_write_timeout(Some(CLIENT_DEADLINE))
        .context("set a deadline")?;
    let mut head = BufReader::new(stream.take(REQUEST_BYTES_MAX));
    let mut request = String::new();
    head.read_line(&mut request).context("read a request")?;
    // The remaining header lines are read and ignored: closing with unread data would reset the connection.
    let mut line = String::new();
    while head.read_line(&mut line).context("read a request")? > 2 {
        line.clear();
    }
    let mut out = stream;
    let Some((with_body, name)) = parse_request(&request) else {
        return refuse(out, "405 Method Not Allowed");
    };
    let Ok(mut file) = File::open(dir.join(name)) else {
        return refuse(out, "404 Not Found");
    };
    let size = file.metadata().context("stat a file")?.len();
    eprintln!("{name}: {size} bytes");
    write!(
        out,
        "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: {size}\r\n\
         Connection: close\r\n\r\n"
    )
    .context("answer")?;
    if with_body {
        io::copy(&mut file, &mut out).context("send a file")?;
    }
    Ok(())
}

/// Whether the body is wanted, and the name of a file directly in the directory.
fn parse_request(line: &str) -> Option<(bool, &str)> {
    let mut words = line.split_whitespace();
    let with_body = match words.next()? {
        "GET" => true,
        "HEAD" => false,
        _ => return None,
    };
    let name = words.next()?.strip_prefix('/')?;
    (!name.contains('/') && !name.starts_with('.')).then_some((with_body, name))
}

fn refuse(mut out: &TcpStream, status: &str) -> Result<()> {
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    out.write_all(head.as_bytes()).context("refuse a request")
}

/// Per read or write. An emulated node is slow to fetch a hundred megabytes.
const CLIENT_DEADLINE: Duration = Duration::from_secs(60);
/// Limit of a request head; the importer sends far less.
const REQUEST_BYTES_MAX: u64 = 16 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_the_directory_itself_are_served() {
        assert_eq!(
            parse_request("GET /vmlinuz HTTP/1.1\r\n"),
            Some((true, "vmlinuz"))
        );
        assert_eq!(
            parse_request("HEAD /vmlinuz HTTP/1.1\r\n"),
            Some((false, "vmlinuz"))
        );
        for bad in [
            "GET /../etc/passwd HTTP/1.1",
            "GET /a/b HTTP/1.1",
            "POST /x HTTP/1.1",
            "",
            "GET",
        ] {
            assert_eq!(parse_request(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_published_file_arrives_whole() {
        let dir = tempfile::tempdir().unwrap();
        let body = vec![7_u8; 100_000];
        std::fs::write(dir.path().join("x"), &body).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let path = dir.path().to_owned();
        named_thread("server", move || {
            answer(&listener.accept().unwrap().0, &path).unwrap()
        })
        .unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        stream
            .write_all(b"GET /x HTTP/1.1\r\nHost: lab\r\n\r\n")
            .unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200"));
        assert!(answer.ends_with(&body));
    }
}
