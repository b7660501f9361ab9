//! The server of `vm.sock`: a thread per connection, which passes requests to the VM actor.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use bascule_ipc::vm::{Request, Response};
use bascule_ipc::{AcceptErrors, Connection, IpcError, Kind};

use super::actor::event::{ActorHandle, Answer, Event};
use super::run_dir::RunDir;

/// Most connections at a time: `bascule-node`, users of the command line, and connections that a
/// killed daemon left behind.
const CONNECTIONS_MAX: usize = 16;
/// Longest wait for a client's hello, and for a client to take its response.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the requested change to be done; after it the response is `Accepted` while the
/// change goes on. Shorter than any client waits. A drain takes milliseconds, unless a disk hangs.
const COMPLETION_TIMEOUT: Duration = Duration::from_secs(3);

/// Binds `vm.sock` and serves it from a thread of its own, for the life of the process.
pub(super) fn listen(run_dir: &RunDir, actor: &ActorHandle) -> io::Result<()> {
    let path = run_dir.socket();
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    let actor = actor.clone();
    std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || accept(&listener, &actor))?;
    Ok(())
}

fn accept(listener: &UnixListener, actor: &ActorHandle) {
    let open = Arc::new(AtomicUsize::new(0));
    let mut errors = AcceptErrors::default();
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                if errors.pause(&error) {
                    tracing::warn!(%error, "accept on vm.sock");
                }
                continue;
            }
        };
        errors.accepted();
        if open.load(Ordering::Relaxed) >= CONNECTIONS_MAX {
            tracing::warn!("too many connections on vm.sock: a connection is refused");
            continue;
        }
        open.fetch_add(1, Ordering::Relaxed);
        let (actor, guard) = (actor.clone(), OpenGuard(Arc::clone(&open)));
        let spawned = std::thread::Builder::new()
            .name("control-conn".to_owned())
            .spawn(move || {
                let _guard = guard;
                match serve(stream, &actor) {
                    Ok(()) => {}
                    Err(error) if error.kind() == Kind::Gone => {}
                    Err(error) => tracing::warn!(%error, "vm.sock"),
                }
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "cannot start a thread for a connection to vm.sock");
        }
    }
}

/// Counts an open connection.
struct OpenGuard(Arc<AtomicUsize>);

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve(stream: UnixStream, actor: &ActorHandle) -> Result<(), IpcError> {
    let mut connection = Connection::open(stream, STEP_TIMEOUT)?;
    loop {
        connection.set_timeout(None)?;
        let (request, _) = connection.recv::<Request>()?;
        let exit = request == Request::Exit;
        let (response, fds) = match actor.request(|reply| Event::Control(request, reply)) {
            Ok(Answer::Now(response, fds)) => (response, fds),
            Ok(Answer::When(done)) => match done.recv_timeout(COMPLETION_TIMEOUT) {
                Ok(Ok(())) | Err(RecvTimeoutError::Timeout) => (Response::Accepted, Vec::new()),
                Ok(Err(reason)) => (Response::Refused { reason }, Vec::new()),
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            },
            Err(_) => return Ok(()),
        };
        connection.set_timeout(Some(STEP_TIMEOUT))?;
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        connection.send(&response, &borrowed)?;
        // Only now, so that the client gets its response.
        if exit && response == Response::Accepted && actor.request(Event::Exit).is_err() {
            return Ok(());
        }
    }
}
