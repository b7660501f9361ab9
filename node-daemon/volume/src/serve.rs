//! `bascule-volume serve`: opens the volume, starts the threads, and ends when it is told to.
//!
//! ```text
//!   open device ─► superblock ─► gate page (lock) ─► sockets ─► threads ─► SIGTERM ─► leave?
//!        ▲              │              │ held by another process
//!        └── retry ◄────┴──────────────┘   meanwhile volume.sock answers Unavailable{reason}
//! ```
//! # Restart
//! A new process takes slot, generation, sequence number and lease from the gate page, under its
//! lock. If the lease has not run out, no gate closes.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use bascule_ipc::Connection;
use bascule_ipc::volume::{Request, Response};
use bascule_types::{ClusterId, NodeUid, VolumeId};
use bascule_volume_format::{RO_COMPAT_KNOWN, Severity, Superblock, check_volume, read_superblock};
use bascule_volume_gate::{GateError, GateTakenOver, GateView, GateWriter, boot_time_now};
use bascule_volume_protocol::{Held, LeasePhase};
use clap::Args;
use rustix::mm::{MlockAllFlags, mlockall};

use crate::device::{Access, Device};
use crate::node::{Node, NodeConfig, NodeParts};
use crate::peer::{PeerResponse, Tls};
use crate::writers::WriterTable;
use crate::{control, coordinate, join, lease, minder, signal, watch};

/// What `serve` takes.
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// The block device, by its stable path, or a plain file (for one host or a lab).
    #[arg(long, visible_alias = "file")]
    pub device: PathBuf,
    /// This node.
    #[arg(long)]
    pub node_uid: NodeUid,
    /// The run directory of this volume; volume.sock and the gate page are in it.
    #[arg(long)]
    pub run_dir: PathBuf,
    /// Where this node's identity is: node.pem, or node.crt, node.key and ca.crt.
    #[arg(long)]
    pub tls_dir: PathBuf,
    /// Where to listen for other nodes.
    #[arg(long)]
    pub listen: SocketAddr,
    /// Where other nodes reach this one, if not at the address of --listen. Port 0 stands for the
    /// port that is listened on.
    #[arg(long)]
    pub advertise: Option<SocketAddr>,
    /// The volume that must be there.
    #[arg(long)]
    pub volume: Option<VolumeId>,
    /// The cluster that it must be bound to.
    #[arg(long)]
    pub cluster: Option<ClusterId>,
    /// The socket of bascule-watchdog; by default two directories above the run directory.
    #[arg(long, visible_alias = "watchdog-socket")]
    pub watchdog_sock: Option<PathBuf>,
}

/// Serves the volume until SIGTERM.
///
/// # Errors
/// When the process cannot even say why it cannot serve: sockets, signals, arguments.
pub fn serve(args: &ServeArgs) -> Result<ExitCode> {
    signal::install().context("install the signal handler")?;
    lock_in_memory();
    fs::create_dir_all(&args.run_dir)
        .with_context(|| format!("create {}", args.run_dir.display()))?;
    let sock = args.run_dir.join("volume.sock");
    let Some((opened, control)) = open_patiently(args, &sock)? else {
        return Ok(ExitCode::SUCCESS);
    };
    let peers =
        TcpListener::bind(args.listen).with_context(|| format!("listen on {}", args.listen))?;
    let address = advertised(args, &peers)?;
    let (node, held, sequence_sent) = assemble(args, opened, address)?;
    let node = Arc::new(node);
    tracing::info!(volume = %node.superblock.volume, %address, ?held, "serves");
    let workers = start_threads(&node, held, sequence_sent)?;
    accept_local(&node, control)?;
    accept_peers(&node, peers)?;
    signal::wait(|| node.is_stopping());
    stop(&node, workers);
    Ok(ExitCode::SUCCESS)
}

/// Memory pressure must not keep the heartbeat waiting for its own pages. Only what is touched, so
/// that the threads' stacks cost nothing; and only as root, because an unprivileged process would
/// hit its limit later, when it starts a thread.
fn lock_in_memory() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let kept = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    if let Err(error) = mlockall(kept) {
        tracing::warn!(%error, "cannot lock this process in memory");
    }
}

/// A volume that is open, and the lock on its gate page.
struct Opened {
    device: Device,
    superblock: Superblock,
    gate: GateWriter,
    found: GateTakenOver,
}

/// Opens the volume; until that works, says on the socket why not. None when told to stop.
fn open_patiently(args: &ServeArgs, sock: &Path) -> Result<Option<(Opened, UnixListener)>> {
    let mut excuse: Option<Excuse> = None;
    loop {
        match open(args) {
            Ok(opened) => {
                drop(excuse);
                return Ok(Some((opened, listen(sock)?)));
            }
            Err(error) => {
                let reason = format!("{error:#}");
                if excuse.as_ref().is_none_or(|excuse| excuse.reason != reason) {
                    tracing::error!(reason, "cannot open the volume");
                    // The socket may be the one of the process that holds the gate page.
                    let busy = matches!(error.downcast_ref(), Some(GateError::Busy { .. }));
                    drop(excuse.take());
                    excuse = if busy {
                        None
                    } else {
                        Some(Excuse::start(sock, reason)?)
                    };
                }
            }
        }
        if signal::wait_for(REOPEN) {
            return Ok(None);
        }
    }
}

fn open(args: &ServeArgs) -> Result<Opened> {
    let path = args.device.display();
    let device =
        Device::open(&args.device, Access::ReadWrite).with_context(|| format!("open {path}"))?;
    let superblock = read_superblock(&mut device.handle()).with_context(|| path.to_string())?;
    let (id, cluster) = (superblock.volume, superblock.cluster);
    if let Some(wanted) = args.volume {
        ensure!(wanted == id, "{path} holds volume {id}, not {wanted}");
    }
    if let Some(wanted) = args.cluster {
        let bound = cluster == wanted;
        ensure!(
            bound,
            "{path}: volume {id} is bound to cluster {cluster}, not {wanted}"
        );
    }
    let unknown = superblock.flags.ro_compat & !RO_COMPAT_KNOWN;
    ensure!(
        unknown == 0,
        "{path} needs a newer release to write it (flags {unknown:#x})"
    );
    let (gate, found) = GateWriter::open(args.run_dir.join("gate"), id)?;
    Ok(Opened {
        device,
        superblock,
        gate,
        found,
    })
}

/// The node, and what an earlier process of this boot left of its lease.
fn assemble(
    args: &ServeArgs,
    opened: Opened,
    address: SocketAddr,
) -> Result<(Node, Option<Held>, u64)> {
    let Opened {
        device,
        superblock,
        gate,
        found,
    } = opened;
    let view = match found {
        GateTakenOver::Existing(view) => Some(view),
        GateTakenOver::Fresh => {
            // No process of this boot ever got the device here.
            WriterTable::forget_all(&args.run_dir).context("clear the table of writers")?;
            None
        }
    };
    if view.is_some_and(|view| view.failed) {
        verify_again(&device)?;
        gate.clear_failed();
    }
    let now = boot_time_now();
    let held = view.and_then(|view: GateView| {
        let owner = view.owner.filter(|_| view.lease_is_valid(now))?;
        let expiry = view.expiry;
        Some(Held { owner, expiry })
    });
    let writers = WriterTable::load(&args.run_dir).context("read the table of writers")?;
    let watchdog_sock = match &args.watchdog_sock {
        Some(path) => path.clone(),
        None => args.run_dir.join("../../watchdog.sock"),
    };
    let node = Node::new(NodeParts {
        config: NodeConfig {
            node: args.node_uid,
            boot: boot_id()?,
            run_dir: args.run_dir.clone(),
            watchdog_sock,
            address,
        },
        superblock,
        device,
        gate,
        tls: Tls::new(&args.tls_dir),
        writers,
        joined: held.map(|held| held.owner),
    });
    Ok((node, held, view.map_or(0, |view| view.sequence_sent)))
}

/// An earlier process failed the volume on this node: it is used again only if it is whole.
fn verify_again(device: &Device) -> Result<()> {
    let report = check_volume(&mut device.handle()).context("verify the failed volume")?;
    match report.worst() {
        Some(Severity::Error) => bail!(
            "the volume failed here and is damaged: {:?}",
            report.findings
        ),
        _ => Ok(()),
    }
}

fn advertised(args: &ServeArgs, listener: &TcpListener) -> Result<SocketAddr> {
    let bound = listener
        .local_addr()
        .context("read the listening address")?;
    let mut address = args.advertise.unwrap_or(bound);
    if address.port() == 0 {
        address.set_port(bound.port());
    }
    ensure!(
        !address.ip().is_unspecified(),
        "--listen {} tells other nodes nothing: give --advertise",
        args.listen
    );
    Ok(address)
}

fn boot_id() -> Result<[u8; 16]> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("read the boot id")?;
    let id: NodeUid = text.trim().parse().context("parse the boot id")?;
    Ok(id.to_bytes())
}

fn start_threads(
    node: &Arc<Node>,
    held: Option<Held>,
    sequence_sent: u64,
) -> Result<Vec<JoinHandle<()>>> {
    let start = |name: &str, run: Box<dyn FnOnce(&Node) + Send>| {
        let node = Arc::clone(node);
        Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let guard = DeathGuard(&node);
                run(&node);
                std::mem::forget(guard);
            })
            .with_context(|| format!("start the {name} thread"))
    };
    // The watchdog's kind belongs in the first heartbeat.
    minder::refresh(node);
    Ok(vec![
        start(
            "lease",
            Box::new(move |node| lease::run(node, held, sequence_sent)),
        )?,
        start("watch", Box::new(watch::run))?,
        start("join", Box::new(join::run))?,
        start("coordinate", Box::new(coordinate::run))?,
        start("minder", Box::new(minder::run))?,
    ])
}

/// A thread that panics ends the process's service: half of it would be worse than none.
struct DeathGuard<'a>(&'a Node);

impl Drop for DeathGuard<'_> {
    fn drop(&mut self) {
        tracing::error!("a thread died");
        self.0.update(|state| state.stopping = true);
    }
}

fn listen(sock: &Path) -> Result<UnixListener> {
    match fs::remove_file(sock) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("remove {}", sock.display()));
        }
        _ => {}
    }
    UnixListener::bind(sock).with_context(|| format!("listen on {}", sock.display()))
}

fn accept_local(node: &Arc<Node>, listener: UnixListener) -> Result<()> {
    let node = Arc::clone(node);
    let accept = move || {
        let open = Arc::new(AtomicUsize::new(0));
        for stream in listener.incoming().flatten() {
            let node = Arc::clone(&node);
            spawn_bounded(&open, "local", move || control::serve(&node, stream));
        }
    };
    Builder::new()
        .name("accept-local".to_owned())
        .spawn(accept)
        .map(drop)
        .context("start the local server")
}

fn accept_peers(node: &Arc<Node>, listener: TcpListener) -> Result<()> {
    let node = Arc::clone(node);
    let accept = move || {
        let open = Arc::new(AtomicUsize::new(0));
        for stream in listener.incoming().flatten() {
            let node = Arc::clone(&node);
            spawn_bounded(&open, "peer", move || serve_peer(&node, stream));
        }
    };
    Builder::new()
        .name("accept-peers".to_owned())
        .spawn(accept)
        .map(drop)
        .context("start the server for other nodes")
}

fn serve_peer(node: &Node, stream: std::net::TcpStream) {
    let served = node.tls.serve(stream, PEER_STEP, |request| {
        if request.volume != node.superblock.volume {
            return PeerResponse::WrongVolume;
        }
        let queue = node
            .state()
            .coordinator
            .as_ref()
            .map(|(_, queue)| queue.clone());
        queue
            .and_then(|queue| node.ask_local(&queue, request, PEER_STEP))
            .unwrap_or(PeerResponse::NotCoordinator)
    });
    if let Err(error) = served {
        tracing::debug!(
            error = format!("{:#}", anyhow!(error)),
            "a peer's connection"
        );
    }
}

/// One thread per connection, and no more than [`CONNECTIONS_MAX`].
fn spawn_bounded(open: &Arc<AtomicUsize>, name: &str, run: impl FnOnce() + Send + 'static) {
    struct Guard(Arc<AtomicUsize>);
    impl Drop for Guard {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }
    let guard = Guard(Arc::clone(open));
    if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
        tracing::warn!(name, "too many connections: one is turned away");
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

/// Leaves the volume if nothing of this node is written to it; otherwise the lease stays for the
/// process that comes next.
fn stop(node: &Node, workers: Vec<JoinHandle<()>>) {
    let leaves = {
        let state = node.state();
        let me = state.joined;
        let owns = state.metadata.as_ref().is_some_and(|(_, rows)| {
            me.is_some()
                && (rows.vms().any(|vm| vm.owner == me)
                    || rows.disks().any(|disk| disk.importer == me))
        });
        let died = state.failed.is_some();
        !died && !owns && !state.writers.must_be_watched() && state.metadata.is_some()
    };
    tracing::info!(leaves, "stops");
    node.update(|state| {
        state.stopping = true;
        state.leaving = leaves && state.lease.phase == LeasePhase::Held;
    });
    for worker in workers {
        // A thread that panicked has said so.
        drop(worker.join());
    }
}

/// Answers every request with the reason why the volume cannot be served.
struct Excuse {
    reason: String,
    sock: PathBuf,
    stop: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Excuse {
    fn start(sock: &Path, reason: String) -> Result<Self> {
        let listener = listen(sock)?;
        let stop = Arc::new(AtomicUsize::new(0));
        let stopped = Arc::clone(&stop);
        let text = reason.clone();
        let open = Arc::new(AtomicUsize::new(0));
        let run = move || {
            for stream in listener.incoming().flatten() {
                if stopped.load(Ordering::Acquire) != 0 {
                    return;
                }
                let reason = text.clone();
                spawn_bounded(&open, "excuse", move || {
                    // The client sees a closed connection whatever went wrong.
                    drop(excuse(stream, reason));
                });
            }
        };
        let thread = Builder::new()
            .name("excuse".to_owned())
            .spawn(run)
            .context("start the excuse thread")?;
        Ok(Self {
            reason,
            sock: sock.to_owned(),
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Excuse {
    fn drop(&mut self) {
        self.stop.store(1, Ordering::Release);
        // Wakes the listener.
        drop(std::os::unix::net::UnixStream::connect(&self.sock));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn excuse(
    stream: std::os::unix::net::UnixStream,
    reason: String,
) -> Result<(), bascule_ipc::IpcError> {
    let mut connection = Connection::open(stream, PEER_STEP)?;
    let response = Response::Unavailable { reason };
    // One request per connection: the next attempt may meet the volume in service.
    connection.recv::<Request>()?;
    connection.send(&response, &[])
}

/// Between two attempts to open the volume.
const REOPEN: Duration = Duration::from_millis(500);
const PEER_STEP: Duration = Duration::from_secs(5);
/// One per VM process, a few for the daemon, and room.
const CONNECTIONS_MAX: usize = 1024;
