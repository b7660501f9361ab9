//! The subcommands `format` and `check`, which work on a volume that no node has attached.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use bascule_types::{Bytes, ClusterId, NodeUid, VolumeId};
use bascule_volume_format::{
    BLOCK_BYTES, BLOCK_BYTES_U64, BlockStore, FORMAT_VERSION, Fencing, FencingPolicy,
    FormatRequest, LayoutError, MakeError, OpenError, Report, Severity, Superblock, Timings,
    check_volume, find_unfinished_format, last_copy, make_volume,
};
use clap::{Args, ValueEnum};

use crate::block_device::{Access, Device, SharedDevice as _};
use crate::output::{complain, show};

/// The arguments of `format`.
#[derive(Args, Debug)]
pub struct FormatArgs {
    /// The block device, by its stable path, or a plain file (for one host or a lab).
    device: PathBuf,
    /// The cluster that the volume is bound to: the UID of the kube-system namespace.
    #[arg(long)]
    cluster: ClusterId,
    /// The node that may attach the volume first; it registers all others.
    #[arg(long, visible_alias = "node-uid")]
    first_node: NodeUid,
    /// The UUID of the new volume; random if not given.
    #[arg(long)]
    volume: Option<VolumeId>,
    /// Overwrite the contents of the device.
    #[arg(long)]
    force: bool,
    /// Create a plain file of this many MiB first, if there is none.
    #[arg(long, value_name = "MIB", conflicts_with = "create_size")]
    create: Option<u32>,
    /// Create a plain file of this many bytes first, if there is none.
    #[arg(long, value_name = "BYTES")]
    create_size: Option<u64>,
    /// Print what was made as JSON.
    #[arg(long)]
    json: bool,
    /// The evidence by which an unreachable node counts as fenced.
    #[arg(long, value_enum, default_value_t = FencingArg::Watchdog)]
    fencing: FencingArg,
    /// Let a software watchdog (softdog) count as a watchdog. It hangs with the kernel that it should reset.
    #[arg(long)]
    allow_software_watchdog: bool,
    /// Let the taint node.kubernetes.io/out-of-service count as a manual fencing confirmation.
    #[arg(long)]
    allow_out_of_service_taint: bool,
    /// How many nodes can attach the volume.
    #[arg(long, default_value_t = 16)]
    slots: u16,
    /// The unit in which disks get space, in MiB.
    #[arg(
        long,
        default_value_t = 1,
        value_name = "MIB",
        conflicts_with = "extent_bytes"
    )]
    extent_mib: u32,
    /// The same in bytes: a whole number of MiB.
    #[arg(long, value_name = "BYTES")]
    extent_bytes: Option<u64>,
    #[command(flatten)]
    timing: TimingArgs,
}

/// The volume's times, in milliseconds.
#[derive(Args, Debug)]
struct TimingArgs {
    /// Lease (L): how long a node may write after it last renewed its heartbeat.
    #[arg(long, default_value_t = 4000, value_name = "MS")]
    lease_ms: u32,
    /// Watch (W): how long a heartbeat must be unchanged before its lease counts as expired; at least
    /// 3 L, which is the default.
    #[arg(long, value_name = "MS")]
    watch_ms: Option<u32>,
    /// How often each node reads the heartbeats of the others; L / 8 if not given.
    #[arg(long, value_name = "MS")]
    poll_ms: Option<u32>,
    /// How often a node renews its lease; at most L / 2, and L / 4 if not given.
    #[arg(long, value_name = "MS")]
    renewal_ms: Option<u32>,
    /// The timeout of the nodes' hardware watchdogs.
    #[arg(long, default_value_t = 10_000, value_name = "MS")]
    watchdog_ms: u32,
    /// Settle time: a write in flight lands within this time after the reset of its host, or never.
    #[arg(long, default_value_t = 4000, value_name = "MS")]
    settle_ms: u32,
}

/// The fencing modes on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum FencingArg {
    /// The heartbeat did not change for the safe time, and a hardware watchdog resets the node.
    Watchdog,
    /// Manual fencing confirmation only.
    LeaseOnly,
    /// Not supported yet: refused.
    PersistentReservation,
}

/// The arguments of `check`.
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
    pub(super) const OTHER_VERSION: u8 = 4;
    pub(super) const UNREADABLE: u8 = 5;
}

/// Why a device was not formatted. Each reason has an exit code.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("{path}: cannot use the device")]
    Unavailable {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} holds {what}; --force destroys it, and every disk on it")]
    NotBlank { path: String, what: String },
    #[error(
        "{path}: an earlier format of this device has not finished, and a write of it may still land: restart the \
         node on which it ran, then use --force"
    )]
    Unfinished { path: String },
    #[error("{path} is too small")]
    TooSmall {
        path: String,
        #[source]
        source: MakeError,
    },
    #[error("{path}")]
    Failed {
        path: String,
        #[source]
        source: MakeError,
    },
}

impl Refused {
    fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Failed { .. } => 1,
            Self::Unavailable { .. } => 3,
            Self::NotBlank { .. } | Self::Unfinished { .. } => 4,
            Self::TooSmall { .. } => 5,
        })
    }
}

/// Formats a device, or prints why not.
///
/// # Errors
/// Invalid arguments, or a failed write to standard output. A refusal is not an error: it has an exit code.
pub fn format(args: &FormatArgs) -> Result<ExitCode> {
    if let Some(bytes) = args.extent_bytes {
        let whole = bytes.is_multiple_of(Bytes::mib(1).0);
        ensure!(whole, "--extent-bytes must be a whole number of MiB");
    }
    match make(args) {
        Ok(superblock) if args.json => {
            let made = serde_json::json!({
                "volume": superblock.volume,
                "cluster": superblock.cluster,
                "safe_time_ms": superblock.timings.safe_time().as_millis().to_string(),
            });
            show(&format!("{made}\n"))?;
            Ok(ExitCode::SUCCESS)
        }
        Ok(superblock) => {
            show(&describe(&superblock))?;
            Ok(ExitCode::SUCCESS)
        }
        Err(refused) => {
            let code = refused.exit_code();
            complain(&format!(
                "bascule-volume: {:#}",
                anyhow::Error::from(refused)
            ));
            Ok(code)
        }
    }
}

fn make(args: &FormatArgs) -> Result<Superblock, Refused> {
    let path = &args.device;
    let shown = path.display().to_string();
    let unavailable = |source| Refused::Unavailable {
        path: shown.clone(),
        source,
    };
    let size = args
        .create
        .map(Bytes::mib)
        .or_else(|| args.create_size.map(Bytes));
    if let Some(size) = size {
        create_file(path, size).map_err(unavailable)?;
    }
    let device = Device::open(path, Access::ReadWrite).map_err(unavailable)?;
    let size = device.size().map_err(unavailable)?;
    if let Some(earlier) = find_unfinished_format(&mut device.handle()).map_err(unavailable)? {
        if !args.force {
            return Err(Refused::Unfinished { path: shown });
        }
        // Whoever says --force may have reset its host just now.
        let seconds = earlier.settle.as_secs_f32().ceil();
        complain(&format!(
            "bascule-volume: {shown}: waiting {seconds} s, until no write of the unfinished format can still land"
        ));
        std::thread::sleep(earlier.settle);
    }
    let found = find_contents(&device, size).map_err(unavailable)?;
    if let Some(what) = found.filter(|_| !args.force) {
        return Err(Refused::NotBlank { path: shown, what });
    }
    let request = args.request(size);
    make_volume(&mut device.handle(), &request, Some(args.first_node)).map_err(|source| {
        let path = shown;
        match source {
            MakeError::Layout(LayoutError::TooSmall { .. }) => Refused::TooSmall { path, source },
            _ => Refused::Failed { path, source },
        }
    })
}

/// Checks a device, read-only, and prints the findings.
///
/// # Errors
/// Standard output cannot be written to. Every outcome of the check has an exit code.
pub fn check(args: &CheckArgs) -> Result<ExitCode> {
    let path = args.device.display();
    let device = match Device::open(&args.device, Access::ReadOnly) {
        Ok(device) => device,
        Err(error) => {
            complain(&format!("{path}: cannot open: {error}"));
            return Ok(ExitCode::from(exit::UNREADABLE));
        }
    };
    let report = match check_volume(&mut device.handle()) {
        Ok(report) => report,
        Err(error) => {
            let code = match &error {
                OpenError::NotAVolume | OpenError::Unfinished => exit::NOT_A_VOLUME,
                OpenError::Newer(_) | OpenError::Older(_) => exit::OTHER_VERSION,
                OpenError::Damaged(_)
                | OpenError::TwoVolumes { .. }
                | OpenError::ForeignHeartbeats { .. }
                | OpenError::CopiesDiffer { .. }
                | OpenError::Truncated { .. } => exit::ERRORS,
                OpenError::Io(_) => exit::UNREADABLE,
            };
            complain(&format!("{path}: {:#}", anyhow::Error::from(error)));
            return Ok(ExitCode::from(code));
        }
    };
    let mut text = summary(&report);
    for finding in &report.findings {
        text += &format!("{finding}\n");
    }
    let (verdict, code) = match report.worst() {
        None => ("clean", exit::CLEAN),
        Some(Severity::Warning) => ("usable, with warnings", exit::WARNINGS),
        Some(Severity::Error) => ("DAMAGED: do not attach it", exit::ERRORS),
    };
    text += &format!("{path}: {verdict}\n");
    show(&text)?;
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
                watch: ms(timing
                    .watch_ms
                    .unwrap_or_else(|| timing.lease_ms.saturating_mul(3))),
                poll: ms(timing.poll_ms.unwrap_or(timing.lease_ms / 8)),
                renewal: ms(timing.renewal_ms.unwrap_or(timing.lease_ms / 4)),
                watchdog: ms(timing.watchdog_ms),
                settle: ms(timing.settle_ms),
            },
            slot_count: self.slots,
            extent_mib: self.extent_bytes.map_or(self.extent_mib, |bytes| {
                u32::try_from(bytes >> 20).unwrap_or(u32::MAX)
            }),
            device_bytes: size.0,
        }
    }
}

/// Creates a file, or extends a shorter one. Idempotent.
fn create_file(path: &Path, size: Bytes) -> std::io::Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    if file.metadata()?.len() < size.0 {
        file.set_len(size.0)?;
    }
    file.sync_all()
}

/// Describes the first block that is not zero in the first two MiB, and from the last whole one on, where file
/// systems, partition tables, LVM and RAID keep their signatures, and Bascule the last superblock.
fn find_contents(device: &Device, size: Bytes) -> std::io::Result<Option<String>> {
    let mut handle = device.handle();
    let blocks = size.0 / BLOCK_BYTES_U64;
    let head = 0..blocks.min(2 * MIB_BLOCKS);
    let tail = last_copy(blocks).map_or(blocks, |lba| lba.0)..blocks;
    for lba in head.chain(tail) {
        let mut block = [0; BLOCK_BYTES];
        handle.read(bascule_types::Lba(lba), &mut block)?;
        if block.iter().all(|byte| *byte == 0) {
            continue;
        }
        return Ok(Some(
            match bascule_volume_format::read_superblock(&mut handle) {
                Ok(superblock) => format!("the Bascule volume {}", superblock.volume),
                Err(_) => format!("data (at byte {})", lba * BLOCK_BYTES_U64),
            },
        ));
    }
    Ok(None)
}

fn describe(superblock: &Superblock) -> String {
    let timings = superblock.timings;
    let extents = superblock.region(bascule_volume_format::RegionKind::Extents);
    let (volume, cluster) = (superblock.volume, superblock.cluster);
    let (slots, extent_mib) = (superblock.slot_count, superblock.extent_mib);
    let (disks_mib, fencing) = (extents.blocks / MIB_BLOCKS, superblock.fencing);
    let (lease, watch, watchdog) = (timings.lease, timings.watch, timings.watchdog);
    let (settle, safe) = (timings.settle, timings.safe_time());
    format!(
        "volume {volume}\ncluster {cluster}\n\
         format {FORMAT_VERSION}, {slots} slots, extents of {extent_mib} MiB, {disks_mib} MiB for disks\n\
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
        let owner = owner.as_deref().unwrap_or("no owner");
        text += &format!("  VM {}: {owner}, epoch {}\n", vm.name, vm.epoch);
    }
    text
}

const MIB_BLOCKS: u64 = 256;
