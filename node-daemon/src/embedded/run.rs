//! `bascule-node run`.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bascule_ipc::vm::{StopReason, VmState};
use bascule_node_api::report::ImportState;
use bascule_types::{Answer, Change, DiskId, DiskRow, Epoch, Owner, Ownership, VmUid};

use super::console::{self, Left};
use super::document::{Document, WantedDisk};
use super::first_run::{attach_or_make, node_with_identity};
use super::interrupt::Interrupt;
use super::local_node::{forget, granted, own_slot, rows, vm_row};
use super::remove::{check_new, remove, remove_unfinished};
use crate::config::NodeConfig;
use crate::output::tell;
use crate::processes::imports::ImportOrder;
use crate::processes::supervisor::Supervisor;
use crate::processes::vms::{Presence, is_over};
use crate::wait::wait_for;

/// `bascule-node run`
#[derive(Debug, clap::Args)]
pub(crate) struct RunVmArgs {
    #[command(flatten)]
    pub(crate) config: NodeConfig,
    /// The VirtualMachine document
    document: PathBuf,
    /// The device or file that the document's volume is on, unless it is attached already
    /// [default: a file in the state directory, made at the first run]
    #[arg(long, value_name = "PATH")]
    backing: Option<PathBuf>,
    /// The address at which other nodes reach this node
    #[arg(long, env = "BASCULE_ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    address: IpAddr,
    /// Create no cgroups (for use without root)
    #[arg(long)]
    no_cgroups: bool,
    /// Start the VM and return, instead of showing its console
    #[arg(long, conflicts_with = "rm")]
    detach: bool,
    /// Remove the VM and its disks when the guest is off, at Ctrl-] or at SIGINT, and the volume's
    /// file if this run has made it. Only for a VM that is not on the volume yet
    #[arg(long)]
    rm: bool,
    /// Log to standard error, which may be the guest's console, instead of the log file
    #[arg(long, short)]
    pub(crate) verbose: bool,
}

/// Runs the document's VM here, with its console on this terminal.
pub(crate) fn run_vm(args: &RunVmArgs) -> Result<()> {
    let document = Document::read(&args.document)?;
    let interrupt = if args.rm {
        Interrupt::catch()?
    } else {
        Interrupt::default()
    };
    let node = node_with_identity(&args.config, args.address, args.no_cgroups)?;
    let made = attach_or_make(&node, &document, args.backing.as_deref())?;
    let volume = &document.spec.volume;
    let owner = own_slot(&node, volume, &interrupt);
    if !args.rm {
        return run_to_end(&node, &document, owner?, args, &interrupt);
    }
    if made.is_none() {
        check_new(&node, &document)?;
    }
    let known = owner.as_ref().ok().copied();
    let ran = owner.and_then(|owner| run_to_end(&node, &document, owner, args, &interrupt));
    let removed = remove(&node, &document, known, made.as_ref());
    match (ran, removed) {
        (Ok(()), removed) => removed.context("some of the VM's disks or files remain"),
        (Err(error), Ok(())) => Err(error),
        (Err(error), Err(left)) => {
            Err(error.context(format!("some of the VM's disks or files remain: {left:#}")))
        }
    }
}

fn run_to_end(
    node: &Supervisor,
    document: &Document,
    owner: Owner,
    args: &RunVmArgs,
    interrupt: &Interrupt,
) -> Result<()> {
    let vm = document.spec.uid;
    node.with_vm_lock(vm, || start_unless_here(node, document, owner, interrupt))?;
    let row = &document.row;
    if args.rm {
        tell(format_args!(
            "{row} runs here. Ctrl-] stops it and removes its disks."
        ));
    } else {
        tell(format_args!(
            "{row} runs here. Ctrl-] leaves the console; the VM runs on."
        ));
    }
    if args.detach {
        return Ok(());
    }
    match console::attach(&node.paths.vm_socket(vm), interrupt)? {
        Left::Detached if !args.rm => {
            tell(format_args!(
                "\r\nStill running. Stop it: bascule-node stop {row}"
            ));
            Ok(())
        }
        Left::Detached | Left::Interrupted => Ok(()),
        Left::Closed => print_result(node, vm),
    }
}

fn start_unless_here(
    node: &Supervisor,
    document: &Document,
    owner: Owner,
    interrupt: &Interrupt,
) -> Result<()> {
    let vm = document.spec.uid;
    if let Some(status) = node.vm_status(vm)
        && !is_over(&status.state)
    {
        return Ok(());
    }
    create(node, document)?;
    let epoch = acquire(node, document, owner)?;
    if let Err(error) = import_all(node, document, Ownership { owner, epoch }, interrupt) {
        if interrupt.arrived() {
            return Err(error);
        }
        return Err(match remove_unfinished(node, document, owner) {
            Ok(()) => error,
            Err(left) => error.context(format!("an unfinished disk remains: {left:#}")),
        });
    }
    interrupt.check()?;
    if let Err(error) = node.start_vm(&document.spec, Ownership { owner, epoch }, false) {
        // Of a process that has ended nothing stays: the next run releases this ownership first.
        if let Presence::Ended(_) = node.presence(vm) {
            node.collect_vm(vm, 0)?;
        }
        return Err(error.into());
    }
    check_started(node, vm)
}

fn create(node: &Supervisor, document: &Document) -> Result<()> {
    let change = Change::CreateVm {
        vm: document.spec.uid,
        name: document.row.clone(),
        spec_digest: document.digest,
    };
    granted(node.change(&document.spec.volume, change))?;
    Ok(())
}

fn acquire(node: &Supervisor, document: &Document, owner: Owner) -> Result<Epoch> {
    let row = vm_row(&rows(node, &document.spec.volume)?, document.spec.uid)?;
    match row.owner {
        // A VM process of this node that was killed has not released its ownership.
        Some(held) if held == owner && !node.vm_is_here(document.spec.uid) => {
            let release = Change::Release {
                vm: row.vm,
                from: owner,
                epoch: row.epoch,
            };
            granted(node.change(&document.spec.volume, release))?;
        }
        _ => {}
    }
    let change = Change::Acquire {
        vm: document.spec.uid,
        expected_epoch: row.epoch,
        to: owner,
    };
    match granted(node.change(&document.spec.volume, change))? {
        Answer::Row(row) => Ok(row.epoch),
        other => bail!("the volume answered {other:?}"),
    }
}

fn import_all(
    node: &Supervisor,
    document: &Document,
    ownership: Ownership,
    interrupt: &Interrupt,
) -> Result<()> {
    for wanted in &document.disks {
        let disk = match &wanted.fill {
            None => {
                let change = Change::AttachDisk {
                    name: wanted.row.clone(),
                    vm: document.spec.uid,
                };
                request_disk(node, document, wanted, change)?
            }
            Some((size, _)) => {
                let change = Change::CreateDisk {
                    vm: document.spec.uid,
                    name: wanted.row.clone(),
                    size: *size,
                    role: wanted.role,
                    importing: true,
                };
                request_disk(node, document, wanted, change)?
            }
        };
        if disk.importing {
            import_one(node, document, ownership, wanted, disk.disk)?;
            await_import(node, wanted, disk.disk, interrupt)?;
        }
    }
    Ok(())
}

fn import_one(
    node: &Supervisor,
    document: &Document,
    ownership: Ownership,
    wanted: &WantedDisk,
    disk: DiskId,
) -> Result<()> {
    let Some((_, source)) = &wanted.fill else {
        return Ok(());
    };
    tell(format_args!("Filling {}…", wanted.row));
    node.import(&ImportOrder {
        volume: &document.spec.volume,
        vm: document.spec.uid,
        owner: ownership.owner,
        epoch: ownership.epoch,
        disk,
        attempt: None,
        source,
    })
    .with_context(|| wanted.field.clone())?;
    Ok(())
}

fn await_import(
    node: &Supervisor,
    wanted: &WantedDisk,
    disk: DiskId,
    interrupt: &Interrupt,
) -> Result<()> {
    let state = wait_for(IMPORT_LIMIT, || {
        node.reap();
        if interrupt.arrived() {
            return Some(ImportState::Running);
        }
        let report = node
            .import_reports()
            .ok()?
            .into_iter()
            .find(|report| report.disk == disk)?;
        (report.state != ImportState::Running).then_some(report.state)
    });
    match state {
        Some(ImportState::Complete { length }) => {
            tell(format_args!("Filled {} with {length}.", wanted.row));
            Ok(())
        }
        Some(ImportState::Failed { message, .. }) => bail!("{}: {message}", wanted.field),
        Some(ImportState::Running) => bail!("interrupted"),
        None => bail!("{}: the import does not end", wanted.field),
    }
}

/// A process whose guest could not be started runs on, so that its status has the reason.
fn check_started(node: &Supervisor, vm: VmUid) -> Result<()> {
    match node.vm_status(vm).map(|status| (status.pid, status.state)) {
        Some((pid, VmState::Stopped(StopReason::Failed { what }))) => {
            node.collect_vm(vm, pid)?;
            bail!("the guest does not start: {what}")
        }
        _ => Ok(()),
    }
}

fn print_result(node: &Supervisor, vm: VmUid) -> Result<()> {
    let last = wait_for(LAST_STATUS_LIMIT, || match node.presence(vm) {
        Presence::Responding(status) if is_over(&status.state) => {
            Some(Presence::Responding(status))
        }
        Presence::Responding(_) | Presence::Unresponsive(_) => None,
        gone => Some(gone),
    });
    let (pid, state) = match last {
        Some(Presence::Responding(status)) => (status.pid, status.state),
        Some(Presence::Ended(Some(state))) => (0, state),
        // `stop` and `migrate` remove the process themselves.
        Some(Presence::Absent) => {
            tell(format_args!("\r\nThe guest is no longer on this node."));
            return Ok(());
        }
        _ => bail!("the VM's process ended without writing a last state (killed?)"),
    };
    forget(node, vm, pid)?;
    match state {
        VmState::Stopped(StopReason::GuestShutdown | StopReason::Requested) => {
            tell(format_args!("\r\nThe guest is off."));
            Ok(())
        }
        VmState::Departed => {
            tell(format_args!("\r\nThe guest has moved to another node."));
            Ok(())
        }
        state => bail!("the guest ended: {state:?}"),
    }
}

/// Requests a change that is answered with a disk of the document.
fn request_disk(
    node: &Supervisor,
    document: &Document,
    wanted: &WantedDisk,
    change: Change,
) -> Result<DiskRow> {
    let answer = granted(node.change(&document.spec.volume, change));
    match answer.with_context(|| format!("disk {}", wanted.row))? {
        Answer::Disk(row) => Ok(row),
        other => bail!("disk {}: the volume answered {other:?}", wanted.row),
    }
}

/// An image of 8 TB at 100 MB/s takes 22 hours. A source that sends nothing and a process that was killed are
/// noticed long before.
const IMPORT_LIMIT: Duration = Duration::from_secs(24 * 3600);
const LAST_STATUS_LIMIT: Duration = Duration::from_secs(30);
