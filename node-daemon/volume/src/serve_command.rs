//! `bascule-volume serve`: opens the volume, starts the threads, and ends on SIGTERM.
//!
//! # States
//! ```text
//!   open device ─► superblock ─► gate page (lock) ─► sockets ─► threads ─► SIGTERM ─► leave?
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

use anyhow::{Context, Result, bail, ensure};
use bascule_types::{ClusterId, NodeUid, VolumeId};
use bascule_volume_format::{RO_COMPAT_KNOWN, Severity, Superblock, check_volume, read_superblock};
use bascule_volume_gate::{GateError, GateTakenOver, GateView, GateWriter, boot_id, boot_time_now};
use bascule_volume_protocol::{Held, LeasePhase};
use clap::Args;
use rustix::mm::{MlockAllFlags, mlockall};

use crate::block_device::{Access, Device, SharedDevice as _};
use crate::coordinator::election;
use crate::host::LinuxHost;
use crate::listeners::{self, UnavailableServer};
use crate::peer_rpc::Tls;
use crate::volume_context::{ProcessConfig, VolumeContext, VolumeContextParts};
use crate::write_ledger::{LedgerParts, WriteLedger};
use crate::writer_lock::start_time;
use crate::writer_table::WriterTable;
use crate::{
    heartbeat_renewal, peer_watch, shutdown_signal, slot_registration, watchdog_client, writers,
};

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
    let (context, held, sequence_sent, ledger) = assemble(args, opened, address)?;
    let context = Arc::new(context);
    tracing::info!(volume = %context.superblock.volume, %address, ?held, "serving the volume");
    let workers = start_threads(&context, held, sequence_sent, ledger)?;
    listeners::accept_local(&context, listener)?;
    listeners::accept_peers(&context, peers, Tls::new(&args.tls_dir))?;
    shutdown_signal::wait(|| context.is_stopping());
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

/// An open volume whose gate page this process has locked.
struct Opened {
    device: Device,
    superblock: Superblock,
    gate: GateWriter,
    found: GateTakenOver,
    ledger: WriteLedger,
}

/// Opens the volume, retrying every [`RETRY_INTERVAL`]; meanwhile volume.sock answers `Unavailable`
/// with the reason. `None` on SIGTERM.
fn open_with_retry(args: &ServeArgs, sock: &Path) -> Result<Option<(Opened, UnixListener)>> {
    let mut unavailable: Option<UnavailableServer> = None;
    loop {
        match open(args) {
            Ok(opened) => {
                drop(unavailable);
                return Ok(Some((opened, listeners::listen(sock)?)));
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
                        Some(UnavailableServer::start(sock, reason)?)
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
    let process = std::process::id();
    let ledger = WriteLedger::open(LedgerParts {
        directory: args.ledger_dir.as_ref().unwrap_or(&args.run_dir),
        volume: id,
        boot: boot_id().context("read the boot id")?.to_bytes(),
        now: boot_time_now(),
        process: (
            process,
            start_time(process).context("this process has no start time")?,
        ),
        device: Box::new(device.clone()),
    });
    let ledger = ledger.context("read which metadata writes may still land")?;
    Ok(Opened {
        device,
        superblock,
        gate,
        found,
        ledger,
    })
}

/// Builds the context, and returns the lease and the highest sequence number that an earlier
/// process of this boot left in the gate page, and what it left in the ledger.
fn assemble(
    args: &ServeArgs,
    opened: Opened,
    address: SocketAddr,
) -> Result<(VolumeContext, Option<Held>, u64, WriteLedger)> {
    let Opened {
        device,
        superblock,
        gate,
        found,
        ledger,
    } = opened;
    let view = match found {
        GateTakenOver::Existing(view) => Some(view),
        GateTakenOver::Fresh => {
            // A fresh gate page: no process of this boot has been a writer yet.
            WriterTable::remove_all(&args.run_dir).context("clear the table of writers")?;
            None
        }
    };
    if view.is_some_and(|view| view.failed) {
        verify_failed_volume(&device)?;
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
    let context = VolumeContext::new(VolumeContextParts {
        config: ProcessConfig {
            node: args.node_uid,
            boot: boot_id().context("read the boot id")?.to_bytes(),
            run_dir: args.run_dir.clone(),
            address,
        },
        superblock,
        device: Box::new(device),
        host: Arc::new(LinuxHost {
            tls: Tls::new(&args.tls_dir),
            watchdog_sock,
        }),
        gate,
        writers,
        joined: held.map(|held| held.owner),
    });
    let sequence_sent = view.map_or(0, |view| view.sequence_sent);
    Ok((context, held, sequence_sent, ledger))
}

/// An earlier process marked the volume as failed on this node: it is served again only if the
/// offline check finds no error.
fn verify_failed_volume(device: &Device) -> Result<()> {
    let report = check_volume(&mut device.handle()).context("verify the failed volume")?;
    match report.worst() {
        Some(Severity::Error) => bail!(
            "the volume failed on this node and is damaged: {:?}",
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
        "other nodes cannot connect to --listen {}: give --advertise",
        args.listen
    );
    Ok(address)
}

fn start_threads(
    context: &Arc<VolumeContext>,
    held: Option<Held>,
    sequence_sent: u64,
    ledger: WriteLedger,
) -> Result<Vec<JoinHandle<()>>> {
    let start = |name: &str, run: Box<dyn FnOnce(&VolumeContext) + Send>| {
        let context = Arc::clone(context);
        Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let guard = PanicGuard(&context);
                run(&context);
                std::mem::forget(guard);
            })
            .with_context(|| format!("start the {name} thread"))
    };
    // Before the first heartbeat is written, because the heartbeat publishes the watchdog's kind.
    watchdog_client::refresh(context);
    Ok(vec![
        start(
            "heartbeat",
            Box::new(move |context| heartbeat_renewal::run(context, held, sequence_sent)),
        )?,
        start("peer-watch", Box::new(peer_watch::run))?,
        start("registration", Box::new(slot_registration::run))?,
        start(
            "coordinator",
            Box::new(move |context| election::run(context, ledger)),
        )?,
        start("writers", Box::new(writers::run))?,
    ])
}

/// Stops the process when a thread panics: the other threads rely on every thread.
struct PanicGuard<'a>(&'a VolumeContext);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        tracing::error!("a thread panicked: stopping");
        self.0.update(|state| state.stopping = true);
    }
}

/// Stops the threads. The node leaves the volume only when it owns nothing and no writer is open;
/// otherwise the lease stays in the gate page for the next process.
fn stop(context: &VolumeContext, workers: Vec<JoinHandle<()>>) {
    let leaves = {
        let state = context.state();
        let me = state.joined;
        let owns = state.metadata.as_ref().is_some_and(|(_, rows)| {
            me.is_some()
                && (rows.vms().any(|vm| vm.owner == me)
                    || rows.disks().any(|disk| disk.importer == me))
        });
        let failed = state.failed.is_some();
        !failed && !owns && !state.writers.must_be_watched() && state.metadata.is_some()
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

/// Between two attempts to open the volume.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
