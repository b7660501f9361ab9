//! The offline tools: `format` and `check`.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bascule_types::{Bytes, ClusterId, NodeUid, VolumeId};
use bascule_volume_format::{
    BLOCK_BYTES, BLOCK_BYTES_U64, BlockStore, Fencing, FencingPolicy, FormatRequest, OpenError,
    Report, Severity, Superblock, Timings, check_volume, make_volume,
};
use clap::{Args, ValueEnum};

use crate::device::{Access, Device};

/// What `format` takes.
#[derive(Args, Debug)]
pub struct FormatArgs {
    /// The block device, by its stable path, or a plain file (for one host or a lab).
    device: PathBuf,
    /// The cluster that the volume is bound to: the UID of the kube-system namespace.
    #[arg(long)]
    cluster: ClusterId,
    /// The node that may attach the volume first; it registers all others.
    #[arg(long)]
    first_node: NodeUid,
    /// The new volume's identity; random if not given.
    #[arg(long)]
    volume: Option<VolumeId>,
    /// Overwrite whatever the device holds.
    #[arg(long)]
    force: bool,
    /// Create a plain file of this many MiB first.
    #[arg(long, value_name = "MIB")]
    create: Option<u32>,
    /// How a silent node's end is proved.
    #[arg(long, value_enum, default_value_t = FencingArg::Watchdog)]
    fencing: FencingArg,
    /// Let a software watchdog (softdog) count. It hangs with the kernel that it should reset.
    #[arg(long)]
    allow_software_watchdog: bool,
    /// Let the taint node.kubernetes.io/out-of-service count as an administrator's word.
    #[arg(long)]
    allow_out_of_service_taint: bool,
    /// How many nodes can attach the volume.
    #[arg(long, default_value_t = 16)]
    slots: u16,
    /// The unit in which disks get space, in MiB.
    #[arg(long, default_value_t = 1, value_name = "MIB")]
    extent_mib: u32,
    #[command(flatten)]
    timing: TimingArgs,
}

/// The volume's times, in milliseconds.
#[derive(Args, Debug)]
struct TimingArgs {
    /// L: how long an acknowledged heartbeat lets its node write.
    #[arg(long, default_value_t = 4000, value_name = "MS")]
    lease_ms: u32,
    /// W: how long a node must be silent before its lease counts as lapsed; at least 3 L.
    #[arg(long, default_value_t = 12_000, value_name = "MS")]
    watch_ms: u32,
    /// How often the heartbeats are read.
    #[arg(long, default_value_t = 500, value_name = "MS")]
    poll_ms: u32,
    /// How often a node renews its lease; at most L / 2.
    #[arg(long, default_value_t = 1000, value_name = "MS")]
    renewal_ms: u32,
    /// The timeout of the nodes' hardware watchdogs.
    #[arg(long, default_value_t = 10_000, value_name = "MS")]
    watchdog_ms: u32,
    /// After the reset of its host a write lands within this time or never.
    #[arg(long, default_value_t = 4000, value_name = "MS")]
    settle_ms: u32,
}

/// The fencing modes on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum FencingArg {
    /// The safe time elapsed under a hardware watchdog.
    Watchdog,
    /// Only an administrator's word.
    LeaseOnly,
    /// Not supported yet: refused.
    PersistentReservation,
}

/// What `check` takes.
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// The block device or file.
    device: PathBuf,
}

/// Exit codes of `check`.
mod exit {
    pub(super) const CLEAN: u8 = 0;
    pub(super) const WARNINGS: u8 = 1;
    pub(super) const ERRORS: u8 = 2;
    pub(super) const NOT_A_VOLUME: u8 = 3;
    pub(super) const NEWER: u8 = 4;
    pub(super) const UNREADABLE: u8 = 5;
}

/// Formats a device.
///
/// # Errors
/// When the device holds anything and `--force` is not given, is too small, or fails.
pub fn format(args: &FormatArgs) -> Result<ExitCode> {
    let path = &args.device;
    if let Some(mib) = args.create {
        create_file(path, Bytes::mib(mib))?;
    }
    let device = Device::open(path, Access::ReadWrite)
        .with_context(|| format!("open {}", path.display()))?;
    let size = device.size().context("read the device's size")?;
    if !args.force {
        refuse_contents(&device, size, path)?;
    }
    let request = args.request(size);
    let superblock = make_volume(&mut device.handle(), &request, Some(args.first_node))
        .with_context(|| format!("format {}", path.display()))?;
    print!("{}", describe(&superblock));
    Ok(ExitCode::SUCCESS)
}

/// Checks a device, read-only, and prints what it found.
///
/// # Errors
/// None: every outcome has an exit code.
pub fn check(args: &CheckArgs) -> Result<ExitCode> {
    let path = args.device.display();
    let device = match Device::open(&args.device, Access::ReadOnly) {
        Ok(device) => device,
        Err(error) => {
            eprintln!("{path}: cannot open: {error}");
            return Ok(ExitCode::from(exit::UNREADABLE));
        }
    };
    let report = match check_volume(&mut device.handle()) {
        Ok(report) => report,
        Err(error) => {
            let code = match &error {
                OpenError::NotAVolume => exit::NOT_A_VOLUME,
                OpenError::Newer(_) => exit::NEWER,
                OpenError::Damaged(_) | OpenError::Truncated { .. } => exit::ERRORS,
                OpenError::Io(_) => exit::UNREADABLE,
            };
            eprintln!("{path}: {:#}", anyhow::Error::from(error));
            return Ok(ExitCode::from(code));
        }
    };
    print!("{}", summary(&report));
    for finding in &report.findings {
        println!("{finding}");
    }
    let (verdict, code) = match report.worst() {
        None => ("clean", exit::CLEAN),
        Some(Severity::Warning) => ("usable, with warnings", exit::WARNINGS),
        Some(Severity::Error) => ("DAMAGED: do not attach it", exit::ERRORS),
    };
    println!("{path}: {verdict}");
    Ok(ExitCode::from(code))
}

impl FormatArgs {
    fn request(&self, size: Bytes) -> FormatRequest {
        let ms = |ms: u32| Duration::from_millis(ms.into());
        let timing = &self.timing;
        FormatRequest {
            volume: self.volume.unwrap_or_else(VolumeId::random),
            cluster: self.cluster,
            fencing: match self.fencing {
                FencingArg::Watchdog => Fencing::Watchdog,
                FencingArg::LeaseOnly => Fencing::LeaseOnly,
                FencingArg::PersistentReservation => Fencing::PersistentReservation,
            },
            policy: FencingPolicy {
                software_watchdog: self.allow_software_watchdog,
                out_of_service_taint: self.allow_out_of_service_taint,
            },
            timings: Timings {
                lease: ms(timing.lease_ms),
                watch: ms(timing.watch_ms),
                poll: ms(timing.poll_ms),
                renewal: ms(timing.renewal_ms),
                watchdog: ms(timing.watchdog_ms),
                settle: ms(timing.settle_ms),
            },
            slot_count: self.slots,
            extent_mib: self.extent_mib,
            device_bytes: size.0,
        }
    }
}

fn create_file(path: &Path, size: Bytes) -> Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .with_context(|| format!("create {}", path.display()))?;
    file.set_len(size.0)
        .with_context(|| format!("lengthen {} to {size}", path.display()))
}

/// Looks for anything that is not zero where file systems, partition tables, LVM and RAID keep
/// their signatures: the first two MiB and the last one.
fn refuse_contents(device: &Device, size: Bytes, path: &Path) -> Result<()> {
    let mut handle = device.handle();
    let blocks = size.0 / BLOCK_BYTES_U64;
    let head = 0..blocks.min(2 * MIB_BLOCKS);
    let tail = blocks.saturating_sub(MIB_BLOCKS)..blocks;
    for lba in head.chain(tail) {
        let mut block = [0; BLOCK_BYTES];
        handle
            .read(bascule_types::Lba(lba), &mut block)
            .context("look for existing contents")?;
        if block.iter().all(|byte| *byte == 0) {
            continue;
        }
        let what = match bascule_volume_format::read_superblock(&mut handle) {
            Ok(superblock) => format!("the Bascule volume {}", superblock.volume),
            Err(_) => format!("data (at byte {})", lba * BLOCK_BYTES_U64),
        };
        bail!(
            "{} holds {what}; --force destroys it, and every disk on it",
            path.display()
        );
    }
    Ok(())
}

fn describe(superblock: &Superblock) -> String {
    let timings = superblock.timings;
    let extents = superblock.region(bascule_volume_format::RegionKind::Extents);
    let (volume, cluster) = (superblock.volume, superblock.cluster);
    let (slots, extent_mib) = (superblock.slot_count, superblock.extent_mib);
    let (disks_mib, fencing) = (extents.blocks / MIB_BLOCKS, superblock.fencing);
    let (lease, watch, watchdog) = (timings.lease, timings.watch, timings.watchdog);
    let (settle, safe) = (timings.settle, timings.t_safe());
    format!(
        "volume {volume}\ncluster {cluster}\n\
         format 1, {slots} slots, extents of {extent_mib} MiB, {disks_mib} MiB for disks\n\
         fencing {fencing:?}, lease {lease:?}, watch {watch:?}, watchdog {watchdog:?}, \
         settle {settle:?}: safe time {safe:?}\n"
    )
}

fn summary(report: &Report) -> String {
    let mut text = report.superblock.as_ref().map(describe).unwrap_or_default();
    text += &match report.leader {
        None => "never had a coordinator\n".to_owned(),
        Some(leader) => {
            let (coordinator, epoch) = (leader.coordinator, leader.epoch);
            format!("last coordinator: {coordinator} in epoch {epoch}\n")
        }
    };
    let Some(recovered) = &report.recovered else {
        return text;
    };
    let rows = &recovered.metadata;
    text += &format!(
        "{} nodes, {} VMs, {} disks, {} saved states, {} fences; {} of {} free\n",
        rows.slots().count(),
        rows.vms().count(),
        rows.disks().count(),
        rows.saved_states().count(),
        rows.fences().count(),
        rows.free(),
        rows.capacity(),
    );
    for vm in rows.vms() {
        let owner = vm.owner.map(|owner| owner.to_string());
        let owner = owner.as_deref().unwrap_or("nobody");
        text += &format!("  VM {}: {owner}, epoch {}\n", vm.name, vm.epoch);
    }
    text
}

const MIB_BLOCKS: u64 = 256;
