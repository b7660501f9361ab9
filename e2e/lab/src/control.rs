//! The lab's connection to a node's PID 1: one JSON document per line, request and response in turn.
//!
//! It is a unix socket in the native tier and a virtio port in the emulated one: a node that is cut off from the
//! network still answers. A virtio port has no notion of a new connection, hence the request's `id`: a response
//! to an earlier, abandoned request is recognized and skipped.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

/// A request of the lab to a node's PID 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Request {
    /// Chosen by the lab; the response repeats it.
    pub id: u64,
    pub op: Op,
}

/// An operation of a node's PID 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Op {
    /// Report the state of all services.
    Status,
    /// Run a program to its end.
    Exec {
        /// Program, looked up in the node's `PATH`, and arguments.
        argv: Vec<String>,
        stdin: Option<String>,
        /// It is killed after this many seconds.
        deadline_s: u64,
    },
    /// Start a service that was stopped.
    Start { service: String },
    /// Kill a service with SIGKILL and leave it down.
    Stop { service: String },
    /// Send a service a signal. If the service ends, it is restarted.
    Signal {
        service: String,
        /// Signal number.
        signal: i32,
    },
    /// Sync the disks and power off.
    PowerOff,
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Response {
    /// The request's id.
    pub id: u64,
    /// Reply, or an error message.
    pub result: Result<Reply, String>,
}

/// Reply to a successful request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The operation has no other result.
    Done,
    /// Reply to [`Op::Status`].
    Status {
        /// Whether all services have been started.
        started: bool,
        /// Each service and its process id in the node; none while it is down.
        services: Vec<(String, Option<i32>)>,
    },
    /// Reply to [`Op::Exec`].
    Exec(ExecOutcome),
}

/// Result of a program on a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecOutcome {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// The lab's end of a node's control connection.
#[derive(Debug, Clone)]
pub struct Control {
    socket: PathBuf,
}

impl Control {
    /// The node behind this unix socket.
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// Sends a request and waits up to `deadline` for the response.
    pub fn ask(&self, op: Op, deadline: Duration) -> Result<Reply> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let seq = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let id = (u64::from(std::process::id()) << 32) | (seq & 0xffff_ffff);
        let shown = format!("{}", self.socket.display());

        let mut stream =
            UnixStream::connect(&self.socket).with_context(|| format!("connect to {shown}"))?;
        stream
            .set_read_timeout(Some(deadline))
            .context("set a read timeout")?;
        stream
            .set_write_timeout(Some(deadline))
            .context("set a write timeout")?;
        let mut line = serde_json::to_vec(&Request { id, op }).context("serialize")?;
        // The leading newline ends a partial request that a killed client may have left in the port.
        line.insert(0, b'\n');
        line.push(b'\n');
        stream
            .write_all(&line)
            .with_context(|| format!("send a request to {shown}"))?;

        let mut reader = BufReader::new(stream);
        loop {
            let mut answer = Vec::new();
            let count = reader
                .read_until(b'\n', &mut answer)
                .with_context(|| format!("no response from {shown} within {deadline:?}"))?;
            ensure!(count > 0, "{shown} closed the connection");
            match serde_json::from_slice::<Response>(&answer) {
                Ok(response) if response.id == id => {
                    return response.result.map_err(|error| anyhow!(error));
                }
                // The response to another client's abandoned request.
                _ => {}
            }
        }
    }

    /// Runs a program on the node, whatever its exit code.
    pub fn exec(
        &self,
        argv: &[&str],
        stdin: Option<&str>,
        deadline: Duration,
    ) -> Result<ExecOutcome> {
        let op = Op::Exec {
            argv: argv.iter().map(|&word| word.to_owned()).collect(),
            stdin: stdin.map(str::to_owned),
            deadline_s: deadline.as_secs(),
        };
        // Longer than the node's own deadline, so that its error arrives.
        match self.ask(op, deadline + Duration::from_secs(10))? {
            Reply::Exec(outcome) => Ok(outcome),
            other => Err(anyhow!("unexpected reply {other:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_response_to_an_abandoned_request_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("control.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = std::thread::Builder::new()
            .name("server".into())
            .spawn(move || {
                let (stream, _) = listener.accept().unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let mut line = String::new();
                while line.trim().is_empty() {
                    line.clear();
                    reader.read_line(&mut line).unwrap();
                }
                let request: Request = serde_json::from_str(&line).unwrap();
                let mut stream = stream;
                for (id, code) in [(request.id + 1, 1), (request.id, 0)] {
                    let outcome = ExecOutcome {
                        code: Some(code),
                        ..ExecOutcome::default()
                    };
                    let response = Response {
                        id,
                        result: Ok(Reply::Exec(outcome)),
                    };
                    let mut bytes = serde_json::to_vec(&response).unwrap();
                    bytes.push(b'\n');
                    stream.write_all(b"half a li\n").unwrap();
                    stream.write_all(&bytes).unwrap();
                }
            });
        let outcome = Control::new(&socket)
            .exec(&["true"], None, Duration::from_secs(5))
            .unwrap();
        assert_eq!(outcome.code, Some(0));
        server.unwrap().join().unwrap();
    }
}
