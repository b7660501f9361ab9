//! The guest's serial console on this terminal.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::interrupt::Interrupt;
use anyhow::{Context, Result, bail};
use bascule_ipc::Connection;
use bascule_ipc::vm::{Request, Response};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// Why [`attach`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// The VM process closed the console: the guest is off, or runs on another node.
    Closed,
    /// Ctrl-] was typed.
    Detached,
    /// SIGINT, SIGTERM or SIGHUP arrived.
    Interrupted,
}

/// Shows the console until the VM process closes it, Ctrl-] is typed, or a signal arrives.
pub(super) fn attach(socket: &Path, interrupt: &Interrupt) -> Result<Left> {
    let mut connection = Connection::connect(socket, HELLO_LIMIT).context("reach the VM")?;
    let (response, fds) = connection
        .call::<_, Response>(&Request::Console)
        .context("open the console")?;
    let (Response::Accepted, Some(fd)) = (&response, fds.into_iter().next()) else {
        bail!("the VM gives no console: {response:?}");
    };
    let stream = UnixStream::from(fd);
    let _raw = RawModeGuard::enter()?;
    shuttle(stream, interrupt)
}

fn shuttle(mut stream: UnixStream, interrupt: &Interrupt) -> Result<Left> {
    let stdin: OwnedFd = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("standard input")?;
    let mut input = File::from(stdin);
    let mut output = io::stdout();
    let mut input_open = true;
    let mut buffer = [0; 4096];
    loop {
        let (guest, typed) = {
            let mut fds = vec![PollFd::new(&stream, PollFlags::IN)];
            let typed = input_open.then(|| {
                fds.push(PollFd::new(&input, PollFlags::IN));
                fds.len() - 1
            });
            if let Some(fd) = interrupt.fd() {
                fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
            }
            rustix::io::retry_on_intr(|| poll(&mut fds, None)).context("wait for the console")?;
            let ready = |index: usize| {
                fds.get(index)
                    .is_some_and(|fd: &PollFd<'_>| !fd.revents().is_empty())
            };
            (ready(0), typed.is_some_and(ready))
        };
        if interrupt.arrived() {
            return Ok(Left::Interrupted);
        }
        if guest {
            let count = stream.read(&mut buffer).unwrap_or(0);
            if count == 0 {
                return Ok(Left::Closed);
            }
            output
                .write_all(buffer.get(..count).unwrap_or_default())
                .context("write")?;
            output.flush().context("write")?;
        }
        if typed {
            let count = input.read(&mut buffer).context("read standard input")?;
            let bytes = buffer.get(..count).unwrap_or_default();
            input_open = count > 0;
            if bytes.contains(&DETACH) {
                return Ok(Left::Detached);
            }
            if stream.write_all(bytes).is_err() {
                return Ok(Left::Closed);
            }
        }
    }
}

/// Keeps the terminal in raw mode, so that the guest receives every key. `Drop` restores the mode.
struct RawModeGuard(Option<Termios>);

impl RawModeGuard {
    fn enter() -> Result<Self> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            return Ok(Self(None));
        }
        let before = tcgetattr(&stdin).context("read the terminal's mode")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).context("set the terminal's mode")?;
        Ok(Self(Some(before)))
    }
}

impl Drop for RawModeGuard {
    fn drop(&mut self) {
        if let Some(before) = &self.0
            && let Err(error) = tcsetattr(io::stdin(), OptionalActions::Now, before)
        {
            tracing::debug!(%error, "cannot restore the terminal's mode");
        }
    }
}

/// Ctrl-], as in telnet and virsh.
const DETACH: u8 = 0x1d;
const HELLO_LIMIT: Duration = Duration::from_secs(5);
