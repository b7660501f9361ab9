//! `bascule-watchdog`: the process that owns the watchdog device of its node.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bascule_volume_gate::LinuxClock;
use bascule_volume_protocol::Rules;
use bascule_watchdog::keepalive::{self, Shared, Slot};
use bascule_watchdog::{
    BoxedDevice, EnlistedVolumes, EnlistmentFile, Host, LinuxHost, Opener, Watchdog,
    WatchdogDevice, device_slot, server, shutdown_signal,
};
use clap::Parser;
use nix::sys::signal::SigSet;
use rustix::fs::{FlockOperation, flock};
use rustix::mm::{MlockAllFlags, mlockall};

/// Keep the watchdog of this node from firing while every volume with open writers has a valid lease.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The watchdog device. Opening it arms it.
    #[arg(long, default_value = "/dev/watchdog", conflicts_with = "none")]
    device: PathBuf,
    /// This node has no watchdog. On volumes with fencing mode Watchdog, its virtual machines are then
    /// taken over only after a manual fencing confirmation.
    #[arg(long)]
    none: bool,
    /// Accept the kernel's softdog, which does not fire when its kernel hangs.
    #[arg(long)]
    allow_softdog: bool,
    /// The timeout to set, in seconds. A volume counts this watchdog only if lease + 2 × timeout is
    /// less than the watch + watchdog times of the volume.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout_seconds: u64,
    /// The device is a named pipe to a watchdog outside of this machine, which resets the machine
    /// when no byte arrives for this many milliseconds.
    #[arg(long, conflicts_with_all = ["none", "allow_softdog"],
          value_parser = clap::value_parser!(u64).range(100..=3_600_000))]
    pipe_timeout_ms: Option<u64>,
    /// The directory for watchdog.sock and watchdog.json; a tmpfs.
    #[arg(long, default_value = "/run/bascule")]
    run_dir: PathBuf,
    /// Hold the device open that comes over standard input.
    #[arg(long, hide = true)]
    hold: bool,
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let arguments = Arguments::parse();
    // Before there is a second thread: threads inherit the mask.
    let signals = shutdown_signal::block().context("block signals")?;
    let run_dir = &arguments.run_dir;
    if arguments.hold {
        return bascule_watchdog::hold(run_dir).context("hold the watchdog device open");
    }
    let lock = std::fs::File::create(run_dir.join("watchdog.lock"))
        .with_context(|| format!("create watchdog.lock in {}", run_dir.display()))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!(
            "another bascule-watchdog is running in {}",
            run_dir.display()
        );
    }
    // The keepalive loop must not wait for its own pages under memory pressure. ONFAULT locks only
    // pages that are touched, not the whole stacks of the threads.
    let kept = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    if let Err(error) = mlockall(kept) {
        tracing::warn!(%error, "cannot lock this process in memory");
    }
    // Before the device is opened, because opening arms it: a process that cannot tell which volumes
    // have writers must not arm anything.
    let store = EnlistmentFile::new(run_dir.join("watchdog.json"))?;
    let volumes = EnlistedVolumes::load(Box::new(store), Rules::ENFORCED)
        .context("load the enlisted volumes")?;
    let listener = server::listen(&run_dir.join("watchdog.sock")).context("listen")?;
    let host: Arc<dyn Host> = Arc::new(linux_host(&arguments));
    let slot = device_slot(&host, &volumes, Rules::ENFORCED);
    let slot = slot.with_context(|| format!("open the watchdog {}", arguments.device.display()))?;
    run(slot, volumes, listener, signals)
}

fn linux_host(arguments: &Arguments) -> LinuxHost {
    let path = arguments.device.clone();
    let watchdog = match arguments.pipe_timeout_ms {
        _ if arguments.none => Watchdog::None,
        Some(timeout_ms) => Watchdog::Pipe {
            path,
            timeout: Duration::from_millis(timeout_ms),
        },
        None => Watchdog::Device {
            path,
            timeout: Duration::from_secs(arguments.timeout_seconds),
            allow_softdog: arguments.allow_softdog,
        },
    };
    LinuxHost {
        run_dir: arguments.run_dir.clone(),
        watchdog,
    }
}

fn run(
    slot: Slot<BoxedDevice, Opener>,
    volumes: EnlistedVolumes,
    listener: std::os::unix::net::UnixListener,
    signals: SigSet,
) -> anyhow::Result<()> {
    let enlisted = volumes.ids().len();
    let device: Option<&dyn WatchdogDevice> = match &slot {
        Slot::Open(device) => {
            tracing::info!(enlisted, "the watchdog is armed");
            Some(device.as_ref())
        }
        Slot::Waiting(_) => None,
    };
    let shared = Shared::new(device, volumes, Arc::new(LinuxClock));
    let served = Arc::clone(&shared);
    std::thread::Builder::new()
        .name("server".to_owned())
        .spawn(move || server::serve(&listener, &served))
        .context("start the server")?;
    shutdown_signal::watch(signals, Arc::clone(&shared)).context("wait for signals")?;
    keepalive::run(slot, &shared).context("open the watchdog")
}
