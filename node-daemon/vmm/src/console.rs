//! The guest's serial output: to a log file, a ring of the last bytes, and the attached terminals.
//!
//! Every byte has a position: the number of bytes that the guest had written before it since its start. Ring and
//! position move with the guest ([`SavedConsole`]), so that a terminal that was attached on the source goes on at the
//! destination where it stopped.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use bascule_ipc::vm::CONSOLE_HISTORY_BYTES;
use serde::{Deserialize, Serialize};

use self::log::Log;
use self::terminal::{Overflow, Terminal};
use crate::blob::Blob;

mod log;
mod terminal;

/// Past output that is kept, in bytes.
const HISTORY_BYTES: usize = CONSOLE_HISTORY_BYTES;
/// Past output that a terminal receives which does not name a position, in bytes.
const SHOWN_BYTES: usize = 64 << 10;
/// Terminals that are attached by position at a time: each has a thread and a queue.
const FOLLOWERS_MAX: usize = 8;

/// The guest's console output. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Console {
    sinks: Arc<Mutex<Sinks>>,
}

#[derive(Debug, Default)]
struct Sinks {
    ring: VecDeque<u8>,
    /// The position of the next byte.
    position: u64,
    /// The position at which the guest came to this process.
    arrival: u64,
    log: Option<Log>,
    /// The terminal of [`Console::attach`].
    local: Option<Terminal>,
    /// The terminals of [`Console::follow`].
    followers: Vec<Terminal>,
}

/// The output of a guest as it moves with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SavedConsole {
    /// The position of the next byte.
    pub(crate) position: u64,
    /// The last bytes, at most [`HISTORY_BYTES`].
    pub(crate) recent: Blob<[u8]>,
}

/// Why no terminal was attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{FOLLOWERS_MAX} consoles are attached already")]
pub struct TooManyTerminals;

impl Console {
    /// A console that keeps its output in memory only, until a terminal is attached.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A console that also writes to `log`, which is not open for appending.
    ///
    /// # Errors
    /// When the file's length cannot be read.
    pub fn with_log(log: File) -> io::Result<Self> {
        let console = Self::new();
        console.lock().log = Some(Log::new(log)?);
        Ok(console)
    }

    /// Sends all further output to `stream` too, in place of an earlier one, after the last 64 KiB
    /// of the output of this process. A terminal that does not keep up loses lines: the guest never waits for it.
    pub fn attach(&self, stream: UnixStream) {
        let mut sinks = self.lock();
        let terminal = Terminal::new(stream, Overflow::DropLines);
        let past = sinks.past(sinks.since(sinks.arrival).min(SHOWN_BYTES));
        sinks.local = terminal.show(&past).then_some(terminal);
    }

    /// Sends the output from position `from` on to `stream`, or the last 64 KiB and what follows without one. Returns the
    /// position of the first byte, which is a later one than `from` where that byte is not kept any more, and that of
    /// the first kept byte where `from` is not reached yet: it is of an earlier start of the guest. A terminal that does not keep up is detached: it comes back with the position that it has reached.
    ///
    /// # Errors
    /// When too many are attached.
    pub fn follow(&self, stream: UnixStream, from: Option<u64>) -> Result<u64, TooManyTerminals> {
        let mut sinks = self.lock();
        sinks.followers.retain(|terminal| !terminal.is_gone());
        if sinks.followers.len() >= FOLLOWERS_MAX {
            return Err(TooManyTerminals);
        }
        let past = sinks.past(match from {
            None => SHOWN_BYTES,
            // Of an earlier start of the guest.
            Some(from) if from > sinks.position => HISTORY_BYTES,
            Some(from) => sinks.since(from),
        });
        let position = sinks.position - count(&past);
        let terminal = Terminal::new(stream, Overflow::Detach);
        if terminal.show(&past) {
            sinks.followers.push(terminal);
        }
        Ok(position)
    }

    /// Detaches the terminals that are attached by position: the guest is off, or runs elsewhere.
    pub fn detach_followers(&self) {
        self.lock().followers.clear();
    }

    /// The last output, at most [`HISTORY_BYTES`].
    #[must_use]
    pub fn recent(&self) -> Vec<u8> {
        self.lock().past(HISTORY_BYTES)
    }

    /// What moves with the guest.
    pub(crate) fn save(&self) -> SavedConsole {
        let sinks = self.lock();
        SavedConsole {
            position: sinks.position,
            recent: Blob::of_bytes(&sinks.past(HISTORY_BYTES)),
        }
    }

    /// Continues the output of a guest that comes here. What a peer sends beyond the bounds is cut.
    pub(crate) fn restore(&self, saved: &SavedConsole) {
        let recent = saved.recent.bytes();
        let kept = recent.get(recent.len().saturating_sub(HISTORY_BYTES)..);
        let kept = kept.unwrap_or_default();
        let mut sinks = self.lock();
        sinks.ring.clear();
        sinks.keep(kept);
        sinks.log(kept);
        sinks.position = saved.position.max(count(kept));
        sinks.arrival = sinks.position;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Sinks> {
        self.sinks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut sinks = self.lock();
        sinks.keep(bytes);
        sinks.log(bytes);
        sinks.show(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sinks {
    fn keep(&mut self, bytes: &[u8]) {
        self.ring.extend(bytes);
        let excess = self.ring.len().saturating_sub(HISTORY_BYTES);
        self.ring.drain(..excess);
        self.position = self.position.saturating_add(count(bytes));
    }

    /// How many bytes were written since position `from`.
    fn since(&self, from: u64) -> usize {
        usize::try_from(self.position.saturating_sub(from)).unwrap_or(usize::MAX)
    }

    /// The last `length` bytes, or as many as are kept.
    fn past(&self, length: usize) -> Vec<u8> {
        let skipped = self.ring.len().saturating_sub(length);
        self.ring.iter().skip(skipped).copied().collect()
    }

    /// Closes a log that cannot be written; the guest runs on.
    fn log(&mut self, bytes: &[u8]) {
        let Some(log) = self.log.as_mut() else {
            return;
        };
        if let Err(error) = log.append(bytes, &self.ring) {
            tracing::warn!(%error, "the console log cannot be written: it is closed");
            self.log = None;
        }
    }

    fn show(&mut self, bytes: &[u8]) {
        if let Some(terminal) = &self.local
            && !terminal.show(bytes)
        {
            self.local = None;
        }
        self.followers.retain(|terminal| terminal.show(bytes));
    }
}

/// The number of `bytes`, as positions count them.
fn count(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
