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

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Repeated in the response.
    pub id: u64,
    /// What is asked for.
    pub op: Op,
}

/// What a node's PID 1 can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// How are you?
    Status,
    /// Run a program to its end.
    Exec {
        /// Program, looked up in the node's `PATH`, and arguments.
        argv: Vec<String>,
        /// Its standard input.
        stdin: Option<String>,
        /// It is killed after this many seconds.
        deadline_s: u64,
    },
    /// Start a service that was stopped.
    Start {
        /// The service.
        service: String,
    },
    /// Kill a service with SIGKILL and leave it down.
    Stop {
        /// The service.
        service: String,
    },
    /// Send a service a signal; when it dies of it, it is started again, as an init system does.
    Signal {
        /// The service.
        service: String,
        /// Signal number.
        signal: i32,
    },
    /// Turn the machine off in an orderly way, as far as disks go.
    PowerOff,
}

/// A response.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Response {
    /// The request's.
    pub id: u64,
    /// What came of it.
    pub result: Result<Reply, String>,
}

/// What comes of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It was done.
    Done,
    /// To [`Op::Status`].
    Status {
        /// Whether all services were started once.
        started: bool,
        /// Each service and its process id in the node; none while it is down.
        services: Vec<(String, Option<i32>)>,
    },
    /// To [`Op::Exec`].
    Exec(ExecOutcome),
}

/// How a program on a node ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecOutcome {
    /// Its exit code; none when a signal ended it.
    pub code: Option<i32>,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
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

    /// Asks, and waits up to `deadline` for the answer.
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
        // The leading line end closes what a client that died halfway through its request has left in a port.
        line.insert(0, b'\n');
        line.push(b'\n');
        stream
            .write_all(&line)
            .with_context(|| format!("ask {shown}"))?;

        let mut reader = BufReader::new(stream);
        loop {
            let mut answer = Vec::new();
            let count = reader
                .read_until(b'\n', &mut answer)
                .with_context(|| format!("no answer from {shown} within {deadline:?}"))?;
            ensure!(count > 0, "{shown} hung up");
            match serde_json::from_slice::<Response>(&answer) {
                Ok(response) if response.id == id => {
                    return response.result.map_err(|error| anyhow!(error));
                }
                // Somebody else's, abandoned.
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
        // The node's own deadline comes first, so that its words arrive.
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
    fn an_answer_to_an_abandoned_request_is_skipped() {
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
