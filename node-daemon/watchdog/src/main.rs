//! `bascule-watchdog`: the process that owns the watchdog device of its node.

use std::io::IsTerminal;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use bascule_volume_gate::boot_time_now;
use bascule_volume_protocol::Rules;
use bascule_volume_protocol::watchdog_policy::Start;
use bascule_watchdog::keepalive::{self, Shared, Slot};
use bascule_watchdog::{
    EnlistedVolumes, EnlistmentStore, HeldDevice, Holder, LinuxDevice, NoDevice, PipeDevice,
    WatchdogDevice, server, shutdown_signal,
};
use clap::Parser;
use nix::sys::signal::SigSet;
use rustix::fs::{FileType, FlockOperation, flock};
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
    let store = EnlistmentStore::new(run_dir.join("watchdog.json"))?;
    let volumes = EnlistedVolumes::load(store).context("load the enlisted volumes")?;
    let listener = server::listen(&run_dir.join("watchdog.sock")).context("listen")?;
    let slot = device_slot(&arguments, &volumes)?;
    run(slot, volumes, listener, signals)
}

type BoxedDevice = Box<dyn WatchdogDevice>;
type Opener = Box<dyn FnOnce() -> std::io::Result<BoxedDevice>>;

/// Adopts the device that a holder has open, opens it, or leaves it closed until every enlisted lease
/// is valid. A device that is held is served whatever the arguments say: it is armed.
fn device_slot(
    arguments: &Arguments,
    volumes: &EnlistedVolumes,
) -> anyhow::Result<Slot<BoxedDevice, Opener>> {
    let held = Holder::find(&arguments.run_dir)?;
    let now = boot_time_now();
    let start = Start::decide(Rules::ENFORCED, held.is_some(), volumes.decide(now));
    if let Some((holder, descriptor)) = held {
        tracing::info!("taking the open watchdog device over");
        return adopt(arguments, holder, descriptor).map(Slot::Open);
    }
    let path = arguments.device.clone();
    let opener = opener(arguments);
    match start {
        Start::Wait(volume) => {
            tracing::error!(
                %volume,
                "a volume with open writers has no valid lease: the watchdog is not opened before it has"
            );
            Ok(Slot::Waiting(opener))
        }
        Start::Adopt | Start::Open => {
            let opened = opener();
            let opened = opened.with_context(|| format!("open the watchdog {}", path.display()))?;
            Ok(Slot::Open(opened))
        }
    }
}

fn adopt(
    arguments: &Arguments,
    holder: Holder,
    descriptor: OwnedFd,
) -> anyhow::Result<BoxedDevice> {
    let run_dir = &arguments.run_dir;
    let mode = rustix::fs::fstat(&descriptor).context("examine the held device")?;
    if FileType::from_raw_mode(mode.st_mode) != FileType::Fifo {
        let device = LinuxDevice::adopt(descriptor).context("take the held device over")?;
        return Ok(Box::new(HeldDevice::adopt(device, run_dir, holder)));
    }
    let timeout_ms = arguments.pipe_timeout_ms.with_context(|| {
        "a named pipe is held as the watchdog device: start with --pipe-timeout-ms".to_owned()
    })?;
    let device = PipeDevice::adopt(descriptor, Duration::from_millis(timeout_ms));
    Ok(Box::new(HeldDevice::adopt(device, run_dir, holder)))
}

fn opener(arguments: &Arguments) -> Opener {
    if arguments.none {
        return Box::new(|| Ok(Box::new(NoDevice)));
    }
    let (path, run_dir) = (arguments.device.clone(), arguments.run_dir.clone());
    if let Some(timeout_ms) = arguments.pipe_timeout_ms {
        let timeout = Duration::from_millis(timeout_ms);
        return Box::new(move || {
            let device = PipeDevice::open(&path, timeout)?;
            Ok(Box::new(HeldDevice::open(device, &run_dir)))
        });
    }
    let timeout = Duration::from_secs(arguments.timeout_seconds);
    let allow_softdog = arguments.allow_softdog;
    Box::new(move || {
        let device = LinuxDevice::open(&path, timeout, allow_softdog)?;
        Ok(Box::new(HeldDevice::open(device, &run_dir)))
    })
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
            let (kind, timeout) = (device.kind(), device.timeout());
            tracing::info!(?kind, ?timeout, enlisted, "the watchdog is armed");
            Some(device.as_ref())
        }
        Slot::Waiting(_) => None,
    };
    let shared = Shared::new(device, volumes);
    let served = std::sync::Arc::clone(&shared);
    std::thread::Builder::new()
        .name("server".to_owned())
        .spawn(move || server::serve(&listener, &served))
        .context("start the server")?;
    shutdown_signal::watch(signals, std::sync::Arc::clone(&shared)).context("wait for signals")?;
    keepalive::run(slot, &shared).context("open the watchdog")
}
