//! Lines to and from the agent, each exchange within limits.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::replies;

/// The client's end of the port.
#[derive(Debug)]
pub(super) struct Channel {
    stream: UnixStream,
    /// Read, and not yet returned as a line: at most [`LINE_BYTES_MAX`] and one read more.
    unread: Vec<u8>,
    /// The number of the last synchronization.
    number: u32,
}

/// Why an exchange came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("no answer within {0:?}")]
    TimeIsUp(Duration),
    #[error("a line of more than {LINE_BYTES_MAX} bytes")]
    TooLong,
    #[error("more than {EXCHANGE_BYTES_MAX} bytes, and no answer in them")]
    TooMuch,
    #[error("an answer that cannot be understood")]
    Malformed(#[source] serde_json::Error),
    #[error("the port is gone")]
    Gone,
    #[error("read or write the port")]
    Port(#[source] io::Error),
}

/// The limits of one exchange.
struct Limits {
    time: Duration,
    deadline: Instant,
    /// Bytes that may still be read.
    bytes: usize,
}

impl Channel {
    /// Synchronizations are numbered from `number` on: an agent that a former client had asked answers with others.
    pub(super) const fn new(stream: UnixStream, number: u32) -> Self {
        Self {
            stream,
            unread: Vec::new(),
            number,
        }
    }

    /// Has the agent drop what was sent before, and drops what it said before: `guest-sync-delimited`. The byte 0xFF
    /// resets the agent's parser, and precedes its answer.
    ///
    /// # Errors
    /// [`Failure`], after `time` at most.
    pub(super) fn synchronize(&mut self, time: Duration) -> Result<(), Failure> {
        self.number = self.number.wrapping_add(1);
        let number = self.number;
        self.unread.clear();
        let mut limits = Limits::new(time);
        let request =
            format!(r#"{{"execute":"guest-sync-delimited","arguments":{{"id":{number}}}}}"#);
        self.write(&[b"\xFF", request.as_bytes(), b"\n"].concat(), &limits)?;
        loop {
            let line = match self.line(&mut limits) {
                Err(Failure::TooLong) => continue,
                line => line?,
            };
            let Some(at) = line.iter().rposition(|&byte| byte == 0xFF) else {
                continue;
            };
            let answer = line.get(at + 1..).unwrap_or_default();
            if replies::parse::<u32>(answer).is_ok_and(|found| found == Some(number)) {
                return Ok(());
            }
        }
    }

    /// Sends one request and returns the next line, which is its answer.
    ///
    /// # Errors
    /// [`Failure`], after `time` at most.
    pub(super) fn ask(&mut self, request: &str, time: Duration) -> Result<Vec<u8>, Failure> {
        let mut limits = Limits::new(time);
        self.write(&[request.as_bytes(), b"\n"].concat(), &limits)?;
        self.line(&mut limits)
    }

    fn write(&mut self, bytes: &[u8], limits: &Limits) -> Result<(), Failure> {
        let left = limits.left()?;
        let written = self
            .stream
            .set_write_timeout(Some(left))
            .and_then(|()| self.stream.write_all(bytes));
        written.map_err(|error| limits.failure(error))
    }

    /// The next line, without its end.
    fn line(&mut self, limits: &mut Limits) -> Result<Vec<u8>, Failure> {
        loop {
            if let Some(end) = self.unread.iter().position(|&byte| byte == b'\n') {
                let rest = self.unread.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.unread, rest);
                line.truncate(end);
                return Ok(line);
            }
            if self.unread.len() > LINE_BYTES_MAX {
                self.unread.clear();
                return Err(Failure::TooLong);
            }
            let mut data = [0; READ_BYTES];
            let left = limits.left()?;
            let count = self
                .stream
                .set_read_timeout(Some(left))
                .and_then(|()| self.stream.read(&mut data));
            let count = count.map_err(|error| limits.failure(error))?;
            if count == 0 {
                return Err(Failure::Gone);
            }
            limits.bytes = limits.bytes.checked_sub(count).ok_or(Failure::TooMuch)?;
            self.unread.extend(data.iter().take(count));
        }
    }
}

impl Limits {
    fn new(time: Duration) -> Self {
        Self {
            time,
            deadline: Instant::now() + time,
            bytes: EXCHANGE_BYTES_MAX,
        }
    }

    /// The time that is left.
    fn left(&self) -> Result<Duration, Failure> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Failure::TimeIsUp(self.time));
        }
        Ok(left)
    }

    fn failure(&self, error: io::Error) -> Failure {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Failure::TimeIsUp(self.time),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Failure::Gone,
            _ => Failure::Port(error),
        }
    }
}

/// Longest answer: the interfaces of a guest that runs 400 containers, with their statistics.
pub(super) const LINE_BYTES_MAX: usize = 256 << 10;
/// Most bytes that are read in one exchange: a longest answer behind what the port had held.
pub(super) const EXCHANGE_BYTES_MAX: usize = 1 << 20;
const READ_BYTES: usize = 4096;
