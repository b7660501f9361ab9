//! `bascule-node serve`: the daemon of one node.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

mod console;
mod execute;
mod reporter;
mod server;
mod status_poller;
mod version;

use anyhow::{Context, Result};
use bascule_node_api::NODE_PORT;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use self::server::{NodeService, publish_reports, serve};
use crate::config::NodeConfig;
use crate::identity::Identity;
use crate::identity::enrollment::{self, EnrollArgs};
use crate::paths::Paths;
use crate::processes::huge_pages;
use crate::processes::launcher::Launcher;
use crate::processes::supervisor::{Parts, Supervisor};

/// `bascule-node serve`
#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) config: NodeConfig,
    #[command(flatten)]
    pub(crate) join: EnrollArgs,
    /// The address at which other nodes and the operator reach this node
    #[arg(long, env = "BASCULE_ADDRESS")]
    pub(crate) address: IpAddr,
    /// The port of this node's API
    #[arg(long, default_value_t = NODE_PORT)]
    pub(crate) port: u16,
    /// Run without Kubernetes, with the certificates that `cert issue` put into the state
    /// directory; other nodes of the same authority may then migrate VMs here
    #[arg(long, conflicts_with = "operator")]
    pub(crate) standalone: bool,
    /// The daemon runs in a container: processes are started outside it, from the state directory
    #[arg(long)]
    pub(crate) in_container: bool,
    /// Create no cgroups (for use without root)
    #[arg(long, conflicts_with = "in_container")]
    pub(crate) no_cgroups: bool,
}

/// Runs the daemon until SIGTERM or SIGINT. The processes that it has started run on.
pub(crate) fn run(args: &ServeArgs) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(serve_node(args))
}

async fn serve_node(args: &ServeArgs) -> Result<()> {
    let paths = Paths::new(&args.config.run_dir, &args.config.state_dir);
    let launcher = Launcher::new(&args.config, args.in_container, !args.no_cgroups)?;
    let identity = if args.standalone {
        Identity::load(&paths)?.with_context(|| {
            format!(
                "{} is missing: make it with `bascule-node cert issue`",
                paths.identity().display()
            )
        })?
    } else {
        enrollment::join_or_resume(&args.join, &paths, args.address).await?
    };
    if !args.config.no_huge_pages {
        match huge_pages::allow(Path::new(huge_pages::SETTING)) {
            Ok(false) => {}
            Ok(true) => tracing::info!("guests' RAM may have transparent huge pages from now on"),
            Err(error) => tracing::warn!(%error, setting = huge_pages::SETTING, "not changed"),
        }
    }
    let parts = Parts {
        identity,
        address: args.address,
        launcher,
    };
    let mut supervisor = Arc::new(Supervisor::new(&args.config, parts)?);
    let starter = Arc::clone(&supervisor);
    let removed = tokio::task::spawn_blocking(move || starter.remove_interrupted_starts()).await;
    if let Err(error) = removed.context("a thread ended").flatten() {
        tracing::warn!(error = format!("{error:#}"), "remove interrupted starts");
    }
    let mut stop = Stop {
        terminate: signal(SignalKind::terminate()).context("handle SIGTERM")?,
        interrupt: signal(SignalKind::interrupt()).context("handle SIGINT")?,
    };
    while let Some(identity) = serve_as(args, &paths, &supervisor, &mut stop).await? {
        tracing::warn!(
            name = %identity.name,
            before = %supervisor.identity.node,
            now = %identity.node,
            "this node was registered anew; its volumes stay attached under the UID from before"
        );
        supervisor = Arc::new(supervisor.under(identity));
    }
    tracing::info!("ending; virtual machines and volume processes run on");
    Ok(())
}

/// The signals that end the daemon.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

/// Serves until the daemon is told to end, or has joined under another identity, which is returned.
async fn serve_as(
    args: &ServeArgs,
    paths: &Paths,
    supervisor: &Arc<Supervisor>,
    stop: &mut Stop,
) -> Result<Option<Identity>> {
    let (report_tx, report_rx) = watch::channel(None);
    // Aborted when this returns.
    let mut work = JoinSet::new();
    work.spawn(publish_reports(Arc::clone(supervisor), report_tx));
    work.spawn(upkeep(Arc::clone(supervisor)));
    let listen = SocketAddr::new(args.address, args.port);
    let tls_dir = paths.tls();
    loop {
        let service = NodeService::new(Arc::clone(supervisor), report_rx.clone(), args.standalone);
        tracing::info!(%listen, node = %supervisor.identity.name, "serving");
        tokio::select! {
            ended = serve(service, listen, &tls_dir, std::future::pending()) => ended?,
            identity = enrollment::renewed(&args.join, paths, args.address), if !args.standalone => {
                if identity != supervisor.identity {
                    return Ok(Some(identity));
                }
            }
            _ = stop.terminate.recv() => return Ok(None),
            _ = stop.interrupt.recv() => return Ok(None),
        }
    }
}

/// Periodic work: restarts the watchdog's process and volume processes that have ended, removes the
/// files of finished imports.
async fn upkeep(supervisor: Arc<Supervisor>) {
    let mut ticks = tokio::time::interval(UPKEEP_INTERVAL);
    loop {
        ticks.tick().await;
        let worker = Arc::clone(&supervisor);
        let outcome = tokio::task::spawn_blocking(move || {
            worker
                .restart_ended_watchdog()
                .and_then(|()| worker.restart_ended_volumes())
                .and_then(|()| worker.remove_finished_imports())
        });
        match outcome.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(error = format!("{error:#}"), "upkeep"),
            Err(error) => tracing::error!(%error, "upkeep"),
        }
    }
}

/// A lease is 4 s by default, and a volume process that has ended must renew it before it lapses.
const UPKEEP_INTERVAL: Duration = Duration::from_millis(500);
