//! The holder: a second process that keeps the watchdog device open, so that the death of
//! `bascule-watchdog` does not close it. The kernel pets a device when its last descriptor is closed,
//! whatever the lease says. A restarted `bascule-watchdog` takes the open descriptor from the holder,
//! which pets nothing.
//!
//! The holder is this same program, started with the hidden flag `--hold`. It never writes to the
//! device, and serves one connection at a time: there is one `bascule-watchdog` per node.

use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use bascule_ipc::watchdog::{HolderRequest, HolderResponse};
use bascule_ipc::{Connection, IpcError};
use rustix::net::{RecvFlags, recv};

use crate::server;

/// A second process that has the watchdog device open.
pub trait Holder: fmt::Debug + Send {
    /// Whether it still runs. Never blocks.
    fn is_alive(&self) -> bool;

    /// Makes it close the device and end.
    ///
    /// # Errors
    /// [`HolderError`]: the device may still be open.
    fn end(&mut self) -> Result<(), HolderError>;
}

/// The connection of `bascule-watchdog` to its holder.
#[derive(Debug)]
pub struct HolderProcess {
    connection: Connection,
}

/// Why a holder is of no use.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    /// It cannot be connected to, for another reason than that it has ended.
    #[error("cannot connect to the process that holds the watchdog device open")]
    Connect(#[source] io::Error),
    /// The connection to it failed.
    #[error("the process that holds the watchdog device open does not answer")]
    Ipc(#[from] IpcError),
    /// The device that it holds cannot be served.
    #[error("cannot take over the watchdog device that another process holds open")]
    Adopt(#[source] io::Error),
    /// It could not be started.
    #[error("cannot start the process that holds the watchdog device open")]
    Start(#[source] io::Error),
    /// It sent no descriptor.
    #[error("the process that holds the watchdog device open sent no descriptor")]
    NoDescriptor,
}

impl HolderProcess {
    /// The holder that an earlier `bascule-watchdog` started, with its descriptor of the device; none
    /// if there is no such process.
    ///
    /// # Errors
    /// [`HolderError`]: a holder runs and cannot be used.
    pub fn find(run_dir: &Path) -> Result<Option<(Self, OwnedFd)>, HolderError> {
        let stream = match UnixStream::connect(run_dir.join(SOCKET)) {
            Ok(stream) => stream,
            // No holder was started, or the one that made the socket file has ended.
            Err(error) => {
                return match error.kind() {
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused => Ok(None),
                    // It may run: another one beside it would keep the device open after a disarm.
                    _ => Err(HolderError::Connect(error)),
                };
            }
        };
        let mut connection = Connection::open(stream, CALL_TIMEOUT)?;
        let (HolderResponse::Done, descriptors) = connection.call(&HolderRequest::Take)?;
        let descriptor = descriptors.into_iter().next();
        let descriptor = descriptor.ok_or(HolderError::NoDescriptor)?;
        Ok(Some((Self { connection }, descriptor)))
    }

    /// Starts a holder of `device`, in a session of its own.
    ///
    /// # Errors
    /// [`HolderError`].
    pub fn start(run_dir: &Path, device: BorrowedFd<'_>) -> Result<Self, HolderError> {
        let (ours, theirs) = UnixStream::pair().map_err(HolderError::Start)?;
        let program = std::env::current_exe().map_err(HolderError::Start)?;
        let child = Command::new(program)
            .arg("--hold")
            .arg("--run-dir")
            .arg(run_dir)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .map_err(HolderError::Start)?;
        tracing::info!(pid = child.id(), "started a holder of the watchdog device");
        let mut connection = Connection::open(ours, CALL_TIMEOUT)?;
        connection.send(&HolderRequest::Hold, &[device])?;
        connection.recv::<HolderResponse>()?;
        Ok(Self { connection })
    }
}

impl Holder for HolderProcess {
    fn is_alive(&self) -> bool {
        let mut byte = [0];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let received = recv(self.connection.stream(), &mut byte, flags);
        matches!(received, Err(rustix::io::Errno::AGAIN))
    }

    fn end(&mut self) -> Result<(), HolderError> {
        self.connection
            .call::<_, HolderResponse>(&HolderRequest::End)?;
        Ok(())
    }
}

/// The holder's own program: receives the device on standard input, and serves until it receives the request to end.
///
/// # Errors
/// Those of its sockets before it holds the device.
pub fn hold(run_dir: &Path) -> anyhow::Result<()> {
    // Only the leader of a process group cannot begin a session: then it has one of its own.
    if let Err(error) = rustix::process::setsid() {
        tracing::debug!(%error, "no new session");
    }
    let first = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut connection = Connection::open(first, CALL_TIMEOUT)?;
    let (_, descriptors) = connection.recv::<HolderRequest>()?;
    let device = descriptors.into_iter().next();
    let device = device.ok_or(HolderError::NoDescriptor)?;
    let listener = server::listen(&run_dir.join(SOCKET))?;
    connection.send(&HolderResponse::Done, &[])?;
    let mut next = Some(connection);
    loop {
        if let Some(connection) = next.take()
            && serve(connection, &device)
        {
            // Before the device is closed, so that no client connects to a holder without a device.
            return Ok(std::fs::remove_file(run_dir.join(SOCKET))?);
        }
        next = match listener.accept() {
            Ok((stream, _)) => Connection::open(stream, CALL_TIMEOUT).ok(),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                std::thread::park_timeout(ACCEPT_PAUSE);
                None
            }
        };
    }
}

/// Serves one connection until it ends. Returns whether the request to end arrived.
fn serve(mut connection: Connection, device: &OwnedFd) -> bool {
    let served = connection.set_timeout(None).and_then(|()| {
        loop {
            let (request, _) = connection.recv::<HolderRequest>()?;
            match request {
                HolderRequest::Take => {
                    connection.send(&HolderResponse::Done, &[device.as_fd()])?;
                }
                HolderRequest::Hold => connection.send(&HolderResponse::Done, &[])?,
                HolderRequest::End => {
                    connection.send(&HolderResponse::Done, &[])?;
                    return Ok(());
                }
            }
        }
    });
    served.is_ok()
}

/// In the run directory.
const SOCKET: &str = "watchdog-holder.sock";
/// For each step of one call. The holder only waits for requests.
const CALL_TIMEOUT: Duration = Duration::from_secs(1);
/// After a failed accept, such as EMFILE.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    /// Regression: every error counted as "there is no holder", and a second one was started beside it.
    #[test]
    fn only_a_missing_or_dead_holder_counts_as_none() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join(SOCKET);
        assert!(HolderProcess::find(dir.path()).unwrap().is_none());
        drop(server::listen(&socket).unwrap());
        assert!(HolderProcess::find(dir.path()).unwrap().is_none(), "dead");
        std::fs::remove_file(&socket).unwrap();
        std::os::unix::fs::symlink(&socket, &socket).unwrap();
        let error = HolderProcess::find(dir.path()).unwrap_err();
        assert!(matches!(error, HolderError::Connect(_)), "{error}");
    }
}
