//! `bascule-volume serve`: opens the volume, starts the threads, and ends on SIGTERM once no
//! process of this node writes any more.
//!
//! # States
//! ```text
//!   open device ─► superblock ─► gate page (lock) ─► sockets ─► threads ─► SIGTERM ─► no writers ─► leave?
//!        ▲              │              │ held by another process
//!        └── retry ◄────┴──────────────┘   meanwhile volume.sock answers Unavailable{reason}
//! ```
//! # Restart
//! A new process takes slot, generation, sequence number and lease from the gate page, under the
//! page's lock. If the lease has not expired, the gate stays open and no guest stalls.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bascule_types::{ClusterId, NodeUid, VolumeId};
use bascule_volume_format::{Copies, Features, read_copies};
use bascule_volume_gate::{GateError, GateWriter, boot_id, boot_time_now};
use bascule_volume_protocol::{LeasePhase, Rules};
use clap::Args;
use rustix::mm::{MlockAllFlags, mlockall};

use crate::block_device::{Access, Device, SharedDevice as _};
use crate::host::LinuxHost;
use crate::listeners::{self, UnavailableServer};
use crate::local_clients::LocalClients;
use crate::peer_rpc::Tls;
use crate::process::{Assembled, Opened, Thread, assemble};
use crate::volume_context::{ProcessConfig, State, VolumeContext};
use crate::write_ledger::{LedgerParts, WriteLedger};
use crate::writer_lock::start_time;
use crate::{shutdown_signal, watchdog_client};

/// The arguments of `serve`.
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// The block device, by its stable path, or a plain file (for one host or a lab).
    #[arg(long, visible_alias = "file")]
    pub device: PathBuf,
    /// The UID of this Kubernetes node.
    #[arg(long)]
    pub node_uid: NodeUid,
    /// The run directory of this volume, on a tmpfs: holds volume.sock, the gate page and the list
    /// of writers.
    #[arg(long)]
    pub run_dir: PathBuf,
    /// The directory of this node's TLS identity: node.pem, or node.crt, node.key and ca.crt.
    #[arg(long)]
    pub tls_dir: PathBuf,
    /// The address and port to listen on for other nodes.
    #[arg(long)]
    pub listen: SocketAddr,
    /// The address at which other nodes reach this one, if it is not the one of --listen. Port 0
    /// stands for the port of --listen.
    #[arg(long)]
    pub advertise: Option<SocketAddr>,
    /// The UUID that the volume must have; any volume if not given.
    #[arg(long)]
    pub volume: Option<VolumeId>,
    /// The UUID of the cluster that the volume must be bound to; any cluster if not given.
    #[arg(long)]
    pub cluster: Option<ClusterId>,
    /// Where this node keeps which of its metadata writes may still land. Must outlive the run directory
    /// until the node reboots, if that is removed before. By default the run directory.
    #[arg(long)]
    pub ledger_dir: Option<PathBuf>,
    /// The group whose members may connect to volume.sock: that of all VM processes. Only this process's user and
    /// root if not given.
    #[arg(long)]
    pub socket_group: Option<u32>,
    /// The directory of the run directories of this node's VMs, by whose groups their processes are known; by default
    /// the directory vms two directories above the run directory.
    #[arg(long)]
    pub vms_dir: Option<PathBuf>,
    /// The socket of bascule-watchdog; by default two directories above the run directory.
    #[arg(long, visible_alias = "watchdog-socket")]
    pub watchdog_sock: Option<PathBuf>,
}

/// Serves the volume until SIGTERM.
///
/// # Errors
/// When not even `Unavailable` can be answered: sockets, signals, arguments. A volume that cannot
/// be opened is no error: opening is retried.
pub fn serve(args: &ServeArgs) -> Result<ExitCode> {
    shutdown_signal::install().context("install the signal handler")?;
    lock_in_memory();
    fs::create_dir_all(&args.run_dir)
        .with_context(|| format!("create {}", args.run_dir.display()))?;
    let sock = args.run_dir.join("volume.sock");
    let Some((opened, listener)) = open_with_retry(args, &sock)? else {
        return Ok(ExitCode::SUCCESS);
    };
    let peers =
        TcpListener::bind(args.listen).with_context(|| format!("listen on {}", args.listen))?;
    let address = advertised(args, &peers)?;
    let host = Arc::new(linux_host(args));
    let assembled = assemble(process_config(args, address)?, host, opened)?;
    let context = Arc::clone(&assembled.context);
    let held = assembled.held();
    tracing::info!(volume = %context.superblock.volume, %address, ?held, "serving the volume");
    let workers = start_threads(assembled)?;
    listeners::accept_local(&context, listener, local_clients(args))?;
    listeners::accept_peers(&context, peers, Tls::new(&args.tls_dir))?;
    shutdown_signal::wait(|| context.is_stopping());
    await_writers(&context);
    stop(&context, workers);
    Ok(ExitCode::SUCCESS)
}

/// Locks this process in memory, so that heartbeat renewal never waits for its own pages under
/// memory pressure. `MLOCK_ONFAULT` locks only pages that are touched, not the whole stacks of the
/// threads. Only as root: an unprivileged process would reach `RLIMIT_MEMLOCK` later, when it
/// starts a thread.
fn lock_in_memory() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let kept = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    if let Err(error) = mlockall(kept) {
        tracing::warn!(%error, "cannot lock this process in memory");
    }
}

/// Opens the volume, retrying every [`RETRY_INTERVAL`]; meanwhile volume.sock answers `Unavailable`
/// with the reason. `None` on SIGTERM.
fn open_with_retry(args: &ServeArgs, sock: &Path) -> Result<Option<(Opened, UnixListener)>> {
    let mut unavailable: Option<UnavailableServer> = None;
    loop {
        match open(args) {
            Ok(opened) => {
                drop(unavailable);
                return Ok(Some((opened, listeners::listen(sock, args.socket_group)?)));
            }
            Err(error) => {
                let reason = format!("{error:#}");
                if unavailable
                    .as_ref()
                    .is_none_or(|server| server.reason() != reason)
                {
                    tracing::error!(reason, "cannot open the volume");
                    // Another process may hold the gate page and serve on this socket.
                    let busy = matches!(error.downcast_ref(), Some(GateError::Busy { .. }));
                    drop(unavailable.take());
                    unavailable = if busy {
                        None
                    } else {
                        Some(UnavailableServer::start(sock, args.socket_group, reason)?)
                    };
                }
            }
        }
        if shutdown_signal::wait_for(RETRY_INTERVAL) {
            return Ok(None);
        }
    }
}

fn open(args: &ServeArgs) -> Result<Opened> {
    let path = args.device.display();
    let device =
        Device::open(&args.device, Access::ReadWrite).with_context(|| format!("open {path}"))?;
    let copies =
        read_copies(&mut device.handle(), Features::KNOWN).with_context(|| path.to_string())?;
    let Copies {
        current: superblock,
        stale,
    } = copies;
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
    superblock
        .check_writable(Features::KNOWN)
        .with_context(|| path.to_string())?;
    let (gate, found) = GateWriter::open(args.run_dir.join("gate"), id)?;
    let process = std::process::id();
    let ledger = WriteLedger::open(LedgerParts {
        directory: args.ledger_dir.as_ref().unwrap_or(&args.run_dir),
        volume: id,
        boot: boot_id().context("read the boot id")?.to_bytes(),
        now: boot_time_now(),
        rules: Rules::ENFORCED,
        process: (
            process,
            start_time(process).context("this process has no start time")?,
        ),
        device: Box::new(device.clone()),
    });
    let ledger = ledger.context("read which metadata writes may still land")?;
    if let Some(stale) = stale {
        tracing::warn!(%stale, "one copy of the superblock is lost: bascule-volume repair writes it again");
    }
    Ok(Opened {
        device: Box::new(device),
        superblock,
        gate,
        found,
        ledger,
    })
}

fn process_config(args: &ServeArgs, address: SocketAddr) -> Result<ProcessConfig> {
    Ok(ProcessConfig {
        node: args.node_uid,
        boot: boot_id().context("read the boot id")?.to_bytes(),
        features: Features::KNOWN,
        rules: Rules::ENFORCED,
        run_dir: args.run_dir.clone(),
        address,
    })
}

fn local_clients(args: &ServeArgs) -> Arc<LocalClients> {
    let above = || args.run_dir.join("../../vms");
    LocalClients::new(args.vms_dir.clone().unwrap_or_else(above))
}

fn linux_host(args: &ServeArgs) -> LinuxHost {
    let watchdog_sock = match &args.watchdog_sock {
        Some(path) => path.clone(),
        None => args.run_dir.join("../../watchdog.sock"),
    };
    LinuxHost::new(Tls::new(&args.tls_dir), watchdog_sock)
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
        "other nodes cannot connect to --listen {}: give --advertise",
        args.listen
    );
    Ok(address)
}

fn start_threads(assembled: Assembled) -> Result<Vec<JoinHandle<()>>> {
    let context = Arc::clone(&assembled.context);
    // Before the first heartbeat is written, because the heartbeat publishes the watchdog's kind.
    watchdog_client::refresh(&context);
    let start = |(name, run): Thread| {
        let context = Arc::clone(&context);
        Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let guard = PanicGuard(&context);
                run(&context);
                std::mem::forget(guard);
            })
            .with_context(|| format!("start the {name} thread"))
    };
    assembled.threads().into_iter().map(start).collect()
}

/// Stops the process when a thread panics: the other threads rely on every thread.
struct PanicGuard<'a>(&'a VolumeContext);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        tracing::error!("a thread panicked: stopping");
        self.0.update(|state| state.stopping = true);
    }
}

/// Waits until no process of this node writes any more. A host that shuts down sends SIGTERM to all
/// processes at once, and without a lease its guests could not write what they write as they shut down.
fn await_writers(context: &VolumeContext) {
    let at_work = || !context.is_stopping() && context.state().writers.are_any_at_work();
    if !at_work() {
        return;
    }
    tracing::info!("ending once the writers of this node have closed");
    while at_work() {
        std::thread::sleep(WRITERS_INTERVAL);
    }
    // A process that has closed releases its ownership next.
    let until = boot_time_now().after(RELEASE_LIMIT);
    while !context.is_stopping() && owns_rows(&context.state()) && boot_time_now() < until {
        std::thread::sleep(WRITERS_INTERVAL);
    }
}

/// Whether this node owns a VM, or fills a disk.
fn owns_rows(state: &State) -> bool {
    let overview = state.overview.as_ref().map(|(_, overview)| overview);
    match (overview, state.joined) {
        (Some(overview), Some(me)) => overview.holders.contains(&me),
        _ => false,
    }
}

/// Stops the threads. The node leaves the volume only when it owns nothing and no writer is open;
/// otherwise the lease stays in the gate page for the next process.
fn stop(context: &VolumeContext, workers: Vec<JoinHandle<()>>) {
    let leaves = {
        let state = context.state();
        let owns = owns_rows(&state);
        let failed = state.failed.is_some();
        !failed && !owns && !state.writers.must_be_watched() && state.overview.is_some()
    };
    tracing::info!(leaves, "stopping");
    context.update(|state| {
        state.stopping = true;
        state.leaving = leaves && state.lease.phase == LeasePhase::Held;
    });
    for worker in workers {
        // PanicGuard has logged a panic already.
        drop(worker.join());
    }
}

/// Between two looks at the writers after SIGTERM.
const WRITERS_INTERVAL: Duration = Duration::from_millis(100);
/// From the close of the last writer after SIGTERM to the release of its ownership; a coordinator answers
/// within milliseconds unless it is being elected.
const RELEASE_LIMIT: Duration = Duration::from_secs(10);
/// Between two attempts to open the volume.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
