//! The guest's serial output: to a log file, a ring of the last bytes, and an attached terminal.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use self::terminal::Terminal;

mod terminal;

/// Past output that a newly attached terminal receives, in bytes.
const RING_BYTES: usize = 64 << 10;
/// The log is truncated at this length in bytes: a guest must not fill the host's disk.
const LOG_BYTES_MAX: u64 = 16 << 20;

/// The guest's console output. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Console {
    sinks: Arc<Mutex<Sinks>>,
}

#[derive(Debug, Default)]
struct Sinks {
    ring: VecDeque<u8>,
    log: Option<File>,
    log_bytes: u64,
    attached: Option<Terminal>,
}

impl Console {
    /// A console that keeps its output in memory only, until a terminal is attached.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A console that also writes to `log`.
    #[must_use]
    pub fn with_log(log: File) -> Self {
        let console = Self::new();
        console.lock().log = Some(log);
        console
    }

    /// Sends all further output to `stream` too, in place of an earlier one, after the last 64 KiB
    /// of past output. A terminal that does not keep up loses lines: the guest never waits for it.
    pub fn attach(&self, stream: UnixStream) {
        let mut sinks = self.lock();
        let past: Vec<u8> = sinks.ring.iter().copied().collect();
        sinks.attached = Some(Terminal::new(stream));
        sinks.show(&past);
    }

    /// The last output, at most 64 KiB.
    #[must_use]
    pub fn recent(&self) -> Vec<u8> {
        self.lock().ring.iter().copied().collect()
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
        let excess = self.ring.len().saturating_sub(RING_BYTES);
        self.ring.drain(..excess);
    }

    /// Closes a log that cannot be written; the guest runs on.
    fn log(&mut self, bytes: &[u8]) {
        let Some(log) = self.log.as_mut() else {
            return;
        };
        let begun_anew = if self.log_bytes >= LOG_BYTES_MAX {
            self.log_bytes = 0;
            rewind(log)
        } else {
            Ok(())
        };
        if let Err(error) = begun_anew.and_then(|()| log.write_all(bytes)) {
            tracing::warn!(%error, "the console log cannot be written: it is closed");
            self.log = None;
            return;
        }
        self.log_bytes += u64::try_from(bytes.len()).unwrap_or(0);
    }

    fn show(&mut self, bytes: &[u8]) {
        if let Some(terminal) = &self.attached
            && !terminal.show(bytes)
        {
            self.attached = None;
        }
    }
}

fn rewind(log: &mut File) -> io::Result<()> {
    log.set_len(0)?;
    io::Seek::rewind(log)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_terminal_that_attaches_late_sees_the_past_and_then_the_present() {
        let mut console = Console::new();
        console.write_all(b"early ").unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        console.attach(ours);
        console.write_all(b"late").unwrap();
        drop(console);
        let mut seen = String::new();
        theirs.read_to_string(&mut seen).unwrap();
        assert_eq!(seen, "early late");
    }

    #[test]
    fn a_terminal_that_does_not_read_never_holds_the_guest_up() {
        let mut console = Console::new();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        console.attach(ours);
        for _ in 0..1024 {
            console.write_all(&[b'x'; 4096]).unwrap();
        }
        assert_eq!(console.recent().len(), RING_BYTES);
    }
}
