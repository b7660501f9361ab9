//! The sockets of one `bascule-volume`: volume.sock for the processes of this node, and the TCP port
//! for other nodes. One thread per connection.

use std::fs::{self, Permissions};
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bascule_ipc::volume::{Request, Response};
use bascule_ipc::{AcceptErrors, Connection, IpcError};

use crate::local_api;
use crate::local_clients::LocalClients;
use crate::peer_rpc::Tls;
use crate::volume_context::VolumeContext;

/// Listens at `sock`, in place of a socket that an earlier process left. Members of `group` may connect, beside this
/// process's user; without one, nobody else.
///
/// # Errors
/// Those of the file system and the socket.
///
/// # Assumes
/// No other process serves at `sock`: the caller holds the lock on the gate page, or knows that no
/// process does.
pub fn listen(sock: &Path, group: Option<u32>) -> Result<UnixListener> {
    // Under another name until it has its group: a client that may not connect yet would give up. No longer than
    // the final name, because the length of a socket's path is limited.
    let draft = sock.with_file_name("sock.new");
    match fs::remove_file(&draft) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("remove {}", draft.display()));
        }
        _ => {}
    }
    let listen = || -> io::Result<UnixListener> {
        let listener = UnixListener::bind(&draft)?;
        if group.is_some() {
            chown(&draft, None, group)?;
            fs::set_permissions(&draft, Permissions::from_mode(0o660))?;
        }
        fs::rename(&draft, sock)?;
        Ok(listener)
    };
    listen().with_context(|| format!("listen on {}", sock.display()))
}

/// Serves the processes of this node until this process ends.
///
/// # Errors
/// When the thread cannot be started.
pub fn accept_local(
    context: &Arc<VolumeContext>,
    listener: UnixListener,
    clients: Arc<LocalClients>,
) -> Result<()> {
    let context = Arc::clone(context);
    let accept = move || {
        let open = Arc::new(AtomicUsize::new(0));
        for stream in accepted("volume.sock", || listener.accept()) {
            let admitted = match clients.admit(&stream) {
                Ok(admitted) => admitted,
                Err(reason) => {
                    tracing::debug!(%reason, "closed a connection to volume.sock");
                    continue;
                }
            };
            let context = Arc::clone(&context);
            spawn_bounded(&open, "local", move || {
                local_api::serve(&context, &admitted, stream);
            });
        }
    };
    Builder::new()
        .name("accept-local".to_owned())
        .spawn(accept)
        .map(drop)
        .context("start the server on volume.sock")
}

/// Serves other nodes until this process ends.
///
/// # Errors
/// When the thread cannot be started.
pub fn accept_peers(context: &Arc<VolumeContext>, listener: TcpListener, tls: Tls) -> Result<()> {
    let context = Arc::clone(context);
    let accept = move || {
        let open = Arc::new(AtomicUsize::new(0));
        for stream in accepted("the port for other nodes", || listener.accept()) {
            let (context, tls) = (Arc::clone(&context), tls.clone());
            spawn_bounded(&open, "peer", move || serve_peer(&context, &tls, stream));
        }
    };
    Builder::new()
        .name("accept-peers".to_owned())
        .spawn(accept)
        .map(drop)
        .context("start the server for other nodes")
}

/// The connections of a listener, without end. After an error it waits a moment.
fn accepted<S, A>(
    listener: &'static str,
    accept: impl Fn() -> io::Result<(S, A)>,
) -> impl Iterator<Item = S> {
    let mut errors = AcceptErrors::default();
    std::iter::repeat_with(move || match accept() {
        Ok((stream, _)) => {
            errors.accepted();
            Some(stream)
        }
        Err(error) => {
            if errors.pause(&error) {
                tracing::warn!(%error, listener, "cannot accept a connection");
            }
            None
        }
    })
    .flatten()
}

fn serve_peer(context: &VolumeContext, tls: &Tls, stream: TcpStream) {
    let served = tls.serve(stream, STEP_TIMEOUT, |request| {
        context.answer_peer(request, STEP_TIMEOUT)
    });
    if let Err(error) = served {
        tracing::debug!(
            error = format!("{:#}", anyhow!(error)),
            "the connection of another node failed"
        );
    }
}

/// Runs `run` on a thread of its own; drops it when [`CONNECTIONS_MAX`] run already.
fn spawn_bounded(open: &Arc<AtomicUsize>, name: &str, run: impl FnOnce() + Send + 'static) {
    struct Guard(Arc<AtomicUsize>);
    impl Drop for Guard {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }
    let guard = Guard(Arc::clone(open));
    if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
        tracing::warn!(name, "closed a connection: too many are open");
        return;
    }
    let spawned = Builder::new().name(name.to_owned()).spawn(move || {
        let _guard = guard;
        run();
    });
    if let Err(error) = spawned {
        tracing::error!(%error, name, "cannot start a thread for a connection");
    }
}

/// Answers every request on volume.sock with `Unavailable`, until it is dropped.
#[derive(Debug)]
pub struct UnavailableServer {
    reason: String,
    sock: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl UnavailableServer {
    /// Listens at `sock`, for `group` too; every answer carries `reason`, for error messages.
    ///
    /// # Errors
    /// Those of the socket, and when the thread cannot be started.
    pub fn start(sock: &Path, group: Option<u32>, reason: String) -> Result<Self> {
        let listener = listen(sock, group)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let text = reason.clone();
        let open = Arc::new(AtomicUsize::new(0));
        let run = move || {
            for stream in accepted("volume.sock", || listener.accept()) {
                if stopped.load(Ordering::Acquire) {
                    return;
                }
                let reason = text.clone();
                spawn_bounded(&open, "unavailable", move || {
                    // On an error the client sees a closed connection.
                    drop(answer_unavailable(stream, reason));
                });
            }
        };
        let thread = Builder::new()
            .name("unavailable".to_owned())
            .spawn(run)
            .context("start the server that answers Unavailable")?;
        Ok(Self {
            reason,
            sock: sock.to_owned(),
            stop,
            thread: Some(thread),
        })
    }

    /// The reason that it answers with.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }
}

impl Drop for UnavailableServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the thread out of accept().
        drop(UnixStream::connect(&self.sock));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn answer_unavailable(stream: UnixStream, reason: String) -> Result<(), IpcError> {
    let mut connection = Connection::open(stream, STEP_TIMEOUT)?;
    let response = Response::Unavailable { reason };
    // One request per connection: the volume may be served when the client connects again.
    connection.recv::<Request>()?;
    connection.send(&response, &[])
}

/// For each read and write on a connection of another node, and of a client that is answered
/// `Unavailable`.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);
/// One per VM process, a few for the node daemon, and room.
const CONNECTIONS_MAX: usize = 1024;
