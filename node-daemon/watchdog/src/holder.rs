//! The holder: a second process that keeps the watchdog device open, so that the death of
//! `bascule-watchdog` does not close it. The kernel pets a device when its last descriptor is closed,
//! whatever the lease says. A restarted `bascule-watchdog` takes the open descriptor from the holder,
//! which pets nothing.
//!
//! The holder is this same program, started with the hidden flag `--hold`. It never writes to the
//! device, and serves one connection at a time: there is one `bascule-watchdog` per node.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use bascule_ipc::watchdog::{HolderRequest, HolderResponse};
use bascule_ipc::{Connection, IpcError};
use rustix::net::{RecvFlags, recv};

use crate::server;

/// The connection of `bascule-watchdog` to its holder.
#[derive(Debug)]
pub struct Holder {
    connection: Connection,
}

/// Why a holder is of no use.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    /// The connection to it failed.
    #[error("the process that holds the watchdog device open does not answer")]
    Ipc(#[from] IpcError),
    /// It could not be started.
    #[error("cannot start the process that holds the watchdog device open")]
    Start(#[source] io::Error),
    /// It sent no descriptor.
    #[error("the process that holds the watchdog device open sent no descriptor")]
    NoDescriptor,
}

impl Holder {
    /// The holder that an earlier `bascule-watchdog` started, with its descriptor of the device; none
    /// if there is no such process.
    ///
    /// # Errors
    /// [`HolderError`]: a holder runs and cannot be used.
    pub fn find(run_dir: &Path) -> Result<Option<(Self, OwnedFd)>, HolderError> {
        let stream = match UnixStream::connect(run_dir.join(SOCKET)) {
            Ok(stream) => stream,
            // The socket file of a holder that has ended refuses connections.
            Err(_) => return Ok(None),
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

    /// Whether the holder still runs. Never blocks.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let mut byte = [0];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let received = recv(self.connection.stream(), &mut byte, flags);
        matches!(received, Err(rustix::io::Errno::AGAIN))
    }

    /// Makes the holder close the device and end.
    ///
    /// # Errors
    /// [`HolderError`]: the device may still be open.
    pub fn end(&mut self) -> Result<(), HolderError> {
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
