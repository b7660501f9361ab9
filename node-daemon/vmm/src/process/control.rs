//! The server of `vm.sock`: a thread per connection, which passes requests to the owner.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use bascule_ipc::vm::{Request, Response};
use bascule_ipc::{Connection, IpcError, Kind};

use super::owner::{Answer, Owner, OwnerHandle};
use super::report::RunDir;

/// Connections at a time: `bascule-node`, a person, and those of a daemon that died without notice.
const CONNECTIONS_MAX: usize = 16;
/// How long a client may take for its hello, and for taking an answer.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an answer waits for what was asked for to be done, rather than begun: shorter than any
/// client waits. A drain takes milliseconds, unless a disk hangs.
const PATIENCE: Duration = Duration::from_secs(3);

/// Binds `vm.sock` and serves it from a thread of its own, for the life of the process.
pub(super) fn listen(run_dir: &RunDir, owner: &OwnerHandle) -> io::Result<()> {
    let path = run_dir.socket();
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    let owner = owner.clone();
    std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || accept(&listener, &owner))?;
    Ok(())
}

fn accept(listener: &UnixListener, owner: &OwnerHandle) {
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "accept on vm.sock");
                continue;
            }
        };
        if open.load(Ordering::Relaxed) >= CONNECTIONS_MAX {
            tracing::warn!("too many connections on vm.sock: one refused");
            continue;
        }
        open.fetch_add(1, Ordering::Relaxed);
        let (owner, guard) = (owner.clone(), OpenGuard(Arc::clone(&open)));
        let spawned = std::thread::Builder::new()
            .name("control-conn".to_owned())
            .spawn(move || {
                let _guard = guard;
                match serve(stream, &owner) {
                    Ok(()) => {}
                    Err(error) if error.kind() == Kind::Gone => {}
                    Err(error) => tracing::warn!(%error, "vm.sock"),
                }
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for a connection");
        }
    }
}

/// Counts a connection while it lives.
struct OpenGuard(Arc<AtomicUsize>);

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve(stream: UnixStream, owner: &OwnerHandle) -> Result<(), IpcError> {
    let mut connection = Connection::open(stream, STEP_TIMEOUT)?;
    loop {
        connection.set_timeout(None)?;
        let (request, _) = connection.recv::<Request>()?;
        tracing::debug!(?request, "asked");
        let exit = request == Request::Exit;
        let (response, fds) = match owner.call(move |owner| owner.request(&request)) {
            Ok(Answer::Now(response, fds)) => (response, fds),
            Ok(Answer::When(done)) => match done.recv_timeout(PATIENCE) {
                Ok(Ok(())) | Err(RecvTimeoutError::Timeout) => (Response::Accepted, Vec::new()),
                Ok(Err(reason)) => (Response::Refused { reason }, Vec::new()),
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            },
            Err(_) => return Ok(()),
        };
        connection.set_timeout(Some(STEP_TIMEOUT))?;
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        connection.send(&response, &borrowed)?;
        // Only now, so that the asker gets its answer.
        if exit && response == Response::Accepted && owner.call(Owner::exit).is_err() {
            return Ok(());
        }
    }
}
