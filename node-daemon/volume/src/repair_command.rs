//! `bascule-volume repair`: says what it would write to a damaged volume, and writes it with `--yes`.
//! What can be repaired, and as what, is decided by [`bascule_volume_format::plan_repair`].

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use bascule_types::{SlotId, error_chain};
use bascule_volume_format::{
    HeartbeatRecord, OpenError, Repair, Repaired, Severity, Superblock, check_volume, plan_repair,
    read_superblock,
};
use bascule_volume_gate::boot_time_now;
use clap::Args;

use crate::block_device::{Access, Device, SharedDevice as _};
use crate::control_blocks::read_heartbeats;
use crate::output::{complain, show};

/// The arguments of `repair`.
#[derive(Args, Debug)]
pub struct RepairArgs {
    /// The block device or file. No node may have it attached.
    device: PathBuf,
    /// Write what is printed otherwise.
    #[arg(long)]
    yes: bool,
}

/// Exit codes of `repair`.
mod exit {
    pub(super) const NOTHING_LEFT: u8 = 0;
    pub(super) const TO_DO: u8 = 1;
    pub(super) const REFUSED: u8 = 2;
    pub(super) const NO_VOLUME: u8 = 3;
}

/// Prints what can be repaired, and repairs it with `--yes`.
///
/// # Errors
/// The device's; and when a node has the volume attached.
pub fn repair(args: &RepairArgs) -> Result<ExitCode> {
    let path = args.device.display();
    let access = if args.yes {
        Access::ReadWrite
    } else {
        Access::ReadOnly
    };
    let device = Device::open(&args.device, access).with_context(|| format!("open {path}"))?;
    let plan = match plan_repair(&mut device.handle()) {
        Ok(plan) => plan,
        Err(error @ OpenError::Io(_)) => return Err(error).with_context(|| path.to_string()),
        Err(error) => {
            complain(&format!("{path}: {}", error_chain(&error)));
            return Ok(ExitCode::from(exit::NO_VOLUME));
        }
    };
    let steps = plan.steps.iter().map(|step| format!("{}\n", step.text));
    let refused = plan.refused.iter();
    let refused = refused.map(|refused| format!("not repaired: {refused}\n"));
    show(&steps.chain(refused).collect::<String>())?;
    if plan.steps.is_empty() {
        show(&format!("{path}: nothing to write\n"))?;
        return Ok(verdict(&plan));
    }
    report_rest(&device, &plan)?;
    if !args.yes {
        show(&format!("{path}: nothing was written; --yes writes this\n"))?;
        return Ok(ExitCode::from(exit::TO_DO));
    }
    ensure_detached(&device)?;
    let repaired = plan.perform(&mut device.handle());
    repaired.with_context(|| format!("{path}: write the repaired blocks"))?;
    show(&format!("{path}: {} blocks written\n", plan.steps.len()))?;
    Ok(verdict(&plan))
}

fn verdict(plan: &Repair) -> ExitCode {
    ExitCode::from(match plan.refused.as_slice() {
        [] => exit::NOTHING_LEFT,
        _ => exit::REFUSED,
    })
}

/// What a check will find after the repair.
fn report_rest(device: &Device, plan: &Repair) -> Result<()> {
    let mut handle = device.handle();
    let report = check_volume(&mut Repaired::new(&mut handle, plan));
    let report = report.context("check what the repair would leave")?;
    let findings = report.findings.iter();
    let findings = findings.map(|finding| format!("left as it is: {finding}\n"));
    let what = match report.worst() {
        None => "the volume is clean then",
        Some(Severity::Warning) => "the volume is usable then, with warnings",
        Some(Severity::Error) => "the volume is still damaged then",
    };
    show(&format!("{}{what}\n", findings.collect::<String>()))
}

/// Refuses a volume on which a heartbeat changes within the watch time.
fn ensure_detached(device: &Device) -> Result<()> {
    let mut handle = device.handle();
    let superblock = read_superblock(&mut handle).context("read the superblock")?;
    let before = heartbeats(device, &superblock)?;
    if before.values().all(|record| record.detached) {
        return Ok(());
    }
    let watch = superblock.timings.watch;
    show(&format!(
        "waiting {watch:?} to see that no node has the volume attached\n"
    ))?;
    let until = boot_time_now().after(watch);
    loop {
        let left = until.since(boot_time_now());
        if left.is_zero() {
            break;
        }
        std::thread::park_timeout(left);
    }
    for (slot, record) in heartbeats(device, &superblock)? {
        let same = before.get(&slot).is_some_and(|earlier| *earlier == record);
        let node = record.node;
        ensure!(
            same || record.detached,
            "node {node} ({slot}) has the volume attached: detach it there first"
        );
    }
    Ok(())
}

fn heartbeats(
    device: &Device,
    superblock: &Superblock,
) -> io::Result<BTreeMap<SlotId, HeartbeatRecord>> {
    let found = read_heartbeats(&mut device.handle(), superblock, superblock.slot_count)?;
    Ok(found
        .into_iter()
        .map(|record| (record.owner.slot, record))
        .collect())
}
