//! One attached terminal. The guest never waits for it.
//!
//! ```text
//!   guest ──► socket                      while the terminal keeps up
//!     └─────► queue ──► thread ──► socket  when the socket is full
//! ```
//! A serial port sends single bytes, of which a socket holds a few hundred. Dropping those that do
//! not fit would leave lines that look whole and say something else, so there is a queue; and when
//! that is full, whole lines are dropped, or the terminal is detached.

use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::SendFlags;

/// Most bytes queued for a terminal: a few screens.
const QUEUE_BYTES_MAX: usize = 256 << 10;

/// What becomes of a terminal that does not keep up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Overflow {
    /// It loses lines.
    DropLines,
    /// It is closed behind what is queued for it.
    Detach,
}

/// A terminal, until it is dropped or gone.
#[derive(Debug)]
pub(super) struct Terminal {
    stream: Arc<UnixStream>,
    queue: Arc<Queue>,
    overflow: Overflow,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    bytes: Vec<u8>,
    /// The thread is writing bytes: later ones must queue behind them.
    sending: bool,
    /// The rest of the present line is dropped.
    skipping: bool,
    /// The terminal is closed, or the console was dropped.
    closed: bool,
}

impl Terminal {
    pub(super) fn new(stream: UnixStream, overflow: Overflow) -> Self {
        let terminal = Self {
            stream: Arc::new(stream),
            queue: Arc::default(),
            overflow,
        };
        let (stream, queue) = (Arc::clone(&terminal.stream), Arc::clone(&terminal.queue));
        let spawned = std::thread::Builder::new()
            .name("terminal".to_owned())
            .spawn(move || {
                queue.pass_on(&stream);
                // The thread that reads from it has another descriptor of it.
                drop(stream.shutdown(Shutdown::Both));
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for a terminal: it is not attached");
            terminal.queue.lock().closed = true;
        }
        terminal
    }

    /// Writes `bytes` to the terminal, now or from the queue. `false` when the terminal is gone.
    pub(super) fn show(&self, bytes: &[u8]) -> bool {
        let mut waiting = self.queue.lock();
        if waiting.closed {
            return false;
        }
        let mut rest = bytes;
        if waiting.bytes.is_empty() && !waiting.sending && !waiting.skipping {
            // The socket itself stays blocking: its other clone is read from.
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::io::retry_on_intr(|| rustix::net::send(&*self.stream, bytes, flags)) {
                Ok(sent) => rest = bytes.get(sent..).unwrap_or_default(),
                Err(Errno::AGAIN) => {}
                Err(_) => return false,
            }
        }
        if rest.is_empty() {
            return true;
        }
        let fits = match self.overflow {
            Overflow::DropLines => {
                waiting.push(rest);
                true
            }
            Overflow::Detach => waiting.push_whole(rest),
        };
        self.queue.changed.notify_one();
        fits
    }

    /// Whether its other end is closed.
    pub(super) fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(&*self.stream, PollFlags::empty())];
        let now = Timespec::default();
        let polled = rustix::io::retry_on_intr(|| poll(&mut fds, Some(&now)));
        let [fd] = &fds;
        let ended = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
        polled.is_ok() && fd.revents().intersects(ended)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.queue.lock().closed = true;
        self.queue.changed.notify_one();
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes queued bytes as fast as the terminal reads them.
    fn pass_on(&self, mut stream: &UnixStream) {
        let mut waiting = self.lock();
        loop {
            waiting.sending = false;
            let wait = |waiting: &mut Waiting| waiting.bytes.is_empty() && !waiting.closed;
            waiting = self
                .changed
                .wait_while(waiting, wait)
                .unwrap_or_else(PoisonError::into_inner);
            // Closed; otherwise what was queued before is still passed on.
            if waiting.bytes.is_empty() {
                return;
            }
            waiting.sending = true;
            let bytes = std::mem::take(&mut waiting.bytes);
            drop(waiting);
            let sent = stream.write_all(&bytes);
            waiting = self.lock();
            if sent.is_err() {
                waiting.closed = true;
                return;
            }
        }
    }
}

impl Waiting {
    /// Queues `bytes`, or closes the queue and returns `false` when they do not fit. A terminal's first bytes are as many
    /// as the ring holds, and may be queued beside the bound.
    fn push_whole(&mut self, bytes: &[u8]) -> bool {
        if !self.bytes.is_empty() && self.bytes.len() + bytes.len() > QUEUE_BYTES_MAX {
            tracing::info!("an attached terminal does not keep up: it is detached");
            self.closed = true;
            return false;
        }
        self.bytes.extend_from_slice(bytes);
        true
    }

    /// Queues `bytes`, dropping lines that do not fit.
    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if !self.skipping && self.bytes.len() >= QUEUE_BYTES_MAX {
                tracing::info!("the attached terminal does not keep up: lines are dropped");
                self.skipping = true;
            }
            if !self.skipping {
                self.bytes.push(byte);
            } else if byte == b'\n' && self.bytes.len() < QUEUE_BYTES_MAX / 2 {
                self.skipping = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};

    use super::*;

    /// Each byte of a line by itself, as a serial port sends them.
    fn print(terminal: &Terminal, line: &str) {
        for byte in line.as_bytes().iter().chain(b"\n") {
            assert!(terminal.show(&[*byte]));
        }
    }

    /// A socket takes a few hundred single bytes. What did not fit used to be dropped byte by byte,
    /// which made `t 5967 61496127` of a busy test's guest a `t 5967 6146127`.
    #[test]
    fn a_terminal_that_reads_late_reads_everything() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let terminal = Terminal::new(ours, Overflow::DropLines);
        for number in 0..LINES {
            print(&terminal, &format!("t {number} {}", number * 1000));
        }
        let mut lines = BufReader::new(theirs).lines();
        for number in 0..LINES {
            let line = lines.next().unwrap().unwrap();
            assert_eq!(line, format!("t {number} {}", number * 1000));
        }
    }

    #[test]
    fn a_terminal_that_never_reads_blocks_no_guest_and_loses_whole_lines() {
        let mut waiting = Waiting::default();
        let line = [b"x".repeat(99), b"\n".to_vec()].concat();
        for _ in 0..QUEUE_BYTES_MAX {
            waiting.push(&line);
        }
        assert!(waiting.bytes.len() <= QUEUE_BYTES_MAX);
        waiting.bytes.clear();
        waiting.push(b"tail of a dropped line\nwhole\n");
        assert_eq!(waiting.bytes, b"whole\n");
    }

    #[test]
    fn writing_to_a_closed_terminal_is_reported() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let terminal = Terminal::new(ours, Overflow::DropLines);
        drop(theirs);
        assert!(!terminal.show(b"x"));
    }

    const LINES: u32 = 2000;
}
