//! The user's terminal: raw mode, what is typed, what is shown.

use std::io::{self, IsTerminal as _, Read, Write};

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::sync::mpsc::{self, Receiver, Sender};

/// What comes from standard input.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Typed {
    /// For the guest.
    Bytes(Vec<u8>),
    /// Ctrl-] was typed.
    Detach,
}

/// The terminal in raw mode, so that the guest receives every key. `Drop` restores the mode.
#[derive(Debug)]
pub(crate) struct Terminal {
    before: Option<Termios>,
    typed_rx: Receiver<Typed>,
}

impl Terminal {
    pub(crate) fn open() -> Result<Self> {
        let stdin = io::stdin();
        let is_terminal = stdin.is_terminal();
        let mut before = None;
        if is_terminal {
            let mode = tcgetattr(&stdin).context("read the terminal's mode")?;
            let mut raw = mode.clone();
            raw.make_raw();
            tcsetattr(&stdin, OptionalActions::Now, &raw).context("set the terminal's mode")?;
            before = Some(mode);
        }
        let (typed_tx, typed_rx) = mpsc::channel(QUEUE);
        let terminal = Self { before, typed_rx };
        std::thread::Builder::new()
            .name("stdin".to_owned())
            .spawn(move || read_input(io::stdin(), is_terminal, &typed_tx))
            .context("start a thread")?;
        Ok(terminal)
    }

    /// What is typed next. Waits without an end when input has ended: the output goes on.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(crate) async fn typed(&mut self) -> Typed {
        match self.typed_rx.recv().await {
            Some(typed) => typed,
            None => std::future::pending().await,
        }
    }

    /// The guest's output, as it is.
    pub(crate) fn show(&self, bytes: &[u8]) -> Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes).context("write")?;
        stdout.flush().context("write")
    }

    /// A message to the user, on a line of its own.
    pub(crate) fn tell(&self, message: &str) {
        // In raw mode a line feed alone does not return to the line's begin.
        let end = if self.before.is_some() { "\r\n" } else { "\n" };
        eprint!("{end}[{message}]{end}");
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before
            && let Err(error) = tcsetattr(io::stdin(), OptionalActions::Now, before)
        {
            eprintln!("cannot restore the terminal's mode: {error}");
        }
    }
}

/// Until the end of input, or the detach key. Keys for which there is no room while there is no connection are dropped,
/// so that the detach key is always seen; what a program writes waits.
fn read_input(mut input: impl Read, is_terminal: bool, typed_tx: &Sender<Typed>) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = input.read(&mut buffer) {
        let bytes = buffer.get(..count).unwrap_or_default();
        let (bytes, detach) = match bytes.iter().position(|byte| *byte == DETACH) {
            Some(index) => (bytes.get(..index).unwrap_or_default(), true),
            None => (bytes, false),
        };
        let typed = Typed::Bytes(bytes.to_vec());
        let gone = match is_terminal {
            _ if bytes.is_empty() => false,
            true => matches!(
                typed_tx.try_send(typed),
                Err(mpsc::error::TrySendError::Closed(_))
            ),
            false => typed_tx.blocking_send(typed).is_err(),
        };
        if gone || (detach && typed_tx.blocking_send(Typed::Detach).is_ok()) {
            return;
        }
    }
}

/// Ctrl-], as in telnet and virsh.
const DETACH: u8 = 0x1d;
/// Keys that wait for a connection.
const QUEUE: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detach_key_ends_the_input_behind_what_was_typed_before() {
        let (typed_tx, mut typed_rx) = mpsc::channel(QUEUE);
        read_input(&b"ls\r\x1dnot this"[..], false, &typed_tx);
        drop(typed_tx);
        assert_eq!(
            typed_rx.blocking_recv(),
            Some(Typed::Bytes(b"ls\r".to_vec()))
        );
        assert_eq!(typed_rx.blocking_recv(), Some(Typed::Detach));
        assert_eq!(typed_rx.blocking_recv(), None);
    }
}
