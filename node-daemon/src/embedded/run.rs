//! `bascule-node run` and `stop`.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bascule_ipc::vm::{Request as VmRequest, StopReason, VmState};
use bascule_ipc::volume::{Request, Rows};
use bascule_node_api::command::{Backing, Outcome};
use bascule_node_api::report::ImportState;
use bascule_types::{
    Answer, Change, DiskId, DiskRow, Epoch, Owner, Ownership, Refusal, VmRow, VmUid,
};

use super::console::{self, Left};
use super::spec::{Document, WantedDisk};
use crate::config::NodeConfig;
use crate::daemon::launcher;
use crate::imports::ImportOrder;
use crate::local::wait_for;
use crate::paths::Paths;
use crate::supervisor::{Identity, Parts, Rejection, Supervisor};
use crate::vms::{Presence, is_over};

/// `bascule-node run`
#[derive(Debug, clap::Args)]
pub(crate) struct RunVmArgs {
    #[command(flatten)]
    pub(crate) config: NodeConfig,
    /// The VirtualMachine document
    document: PathBuf,
    /// The device or file that the document's volume is on, unless it is attached already
    #[arg(long, value_name = "PATH")]
    backing: Option<PathBuf>,
    /// The address that other nodes reach this node at
    #[arg(long, env = "BASCULE_ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    address: IpAddr,
    /// Make no cgroups (without root)
    #[arg(long)]
    no_cgroups: bool,
    /// Start the VM and return, instead of showing its console
    #[arg(long)]
    detach: bool,
}

/// `bascule-node stop`
#[derive(Debug, clap::Args)]
pub(crate) struct StopVmArgs {
    #[command(flatten)]
    config: NodeConfig,
    /// The VM's name, or namespace/name
    name: String,
    /// Do not wait for the guest: stop it now
    #[arg(long)]
    force: bool,
}

/// Runs the document's VM here, with its console on this terminal.
pub(crate) fn run_vm(args: &RunVmArgs) -> Result<()> {
    let document = Document::read(&args.document)?;
    let node = supervisor(&args.config, args.address, args.no_cgroups)?;
    let vm = document.spec.uid;
    attach(&node, &document.spec.volume, args.backing.as_deref())?;
    let owner = own_slot(&node, &document.spec.volume)?;
    node.exclusively(vm, || start_unless_here(&node, &document, owner))?;
    eprintln!(
        "{} runs here. Ctrl-] leaves the console; the VM goes on.",
        document.row
    );
    if args.detach {
        return Ok(());
    }
    match console::attach(&node.paths.vm_socket(vm))? {
        Left::Detached => {
            eprintln!(
                "\r\nStill running. Stop it: bascule-node stop {}",
                document.row
            );
            Ok(())
        }
        Left::Closed => say_how_it_ended(&node, vm),
    }
}

fn start_unless_here(node: &Supervisor, document: &Document, owner: Owner) -> Result<()> {
    let vm = document.spec.uid;
    if let Some(status) = node.vm_status(vm)
        && !is_over(&status.state)
    {
        return Ok(());
    }
    create(node, document)?;
    let epoch = acquire(node, document, owner)?;
    import_all(node, document, Ownership { owner, epoch })?;
    node.start_vm(&document.spec, Ownership { owner, epoch }, false)?;
    check_started(node, vm)
}

/// Stops a VM of this node and forgets its process.
pub(crate) fn stop_vm(args: &StopVmArgs) -> Result<()> {
    let node = supervisor(&args.config, IpAddr::V4(Ipv4Addr::LOCALHOST), true)?;
    let vm = find(&node, &args.name)?;
    let watch = node.watch(vm)?;
    if args.force {
        node.vm_request(vm, &VmRequest::Stop)?;
    } else {
        node.vm_request(vm, &VmRequest::PowerButton)?;
        eprintln!("Pressed the power button; waiting for the guest to shut down.");
    }
    let over = || match node.presence(vm) {
        Presence::Answering(status) if is_over(&status.state) => Some(status.pid),
        Presence::Answering(_) | Presence::Silent(_) => None,
        Presence::Ended(_) | Presence::Absent => Some(0),
    };
    match wait_for(SHUTDOWN_LIMIT, over) {
        Some(pid) => {
            drop(watch);
            forget(&node, vm, pid)?;
            eprintln!("Stopped.");
            Ok(())
        }
        None => match node.vm_waits_for(vm) {
            Some(what) => bail!("the guest is not off yet: it waits for {what}"),
            None => {
                bail!("the guest has not shut down; `bascule-node stop --force` stops it now")
            }
        },
    }
}

/// A supervisor for one command: the processes it starts live on.
pub(super) fn supervisor(
    config: &NodeConfig,
    address: IpAddr,
    no_cgroups: bool,
) -> Result<Supervisor> {
    let paths = Paths::new(&config.run_dir, &config.state_dir);
    let identity = Identity::load(&paths)?.with_context(|| {
        format!(
            "this node has no identity in {}: make one with `bascule-node cert init` and \
             `bascule-node cert issue`",
            config.state_dir.display()
        )
    })?;
    let launcher = launcher(config, false, !no_cgroups)?;
    Supervisor::new(
        config,
        Parts {
            identity,
            address,
            launcher,
        },
    )
}

/// Attaches a volume, unless it is attached.
pub(super) fn attach(
    node: &Supervisor,
    volume: &str,
    backing: Option<&std::path::Path>,
) -> Result<()> {
    if node.volume_status(volume).is_ok() {
        return Ok(());
    }
    let path = backing.with_context(|| {
        format!("volume {volume} is not attached: say where it is with --backing PATH")
    })?;
    let path = std::path::absolute(path).context("--backing")?;
    let is_file = std::fs::metadata(&path)
        .with_context(|| format!("--backing {}", path.display()))?
        .is_file();
    let backing = if is_file {
        Backing::File { path, size: None }
    } else {
        Backing::Device { path }
    };
    node.attach_volume(volume, &backing, None, node.identity.cluster)?;
    Ok(())
}

/// Waits until this node has its slot on the volume and a lease.
pub(super) fn own_slot(node: &Supervisor, volume: &str) -> Result<Owner> {
    let mut last = String::new();
    let owner = wait_for(LEASE_LIMIT, || match node.volume_status(volume) {
        Ok(status) if status.lease_left_ms > 0 => status.owner,
        Ok(status) => {
            last = status.reason.unwrap_or_else(|| "no lease yet".to_owned());
            None
        }
        Err(reason) => {
            last = reason;
            None
        }
    });
    owner.with_context(|| format!("volume {volume} is not usable here: {last}"))
}

/// The VM of this node with that name.
pub(super) fn find(node: &Supervisor, name: &str) -> Result<VmUid> {
    let reports = node.vm_reports()?;
    let full = if name.contains('/') {
        name.to_owned()
    } else {
        format!("default/{name}")
    };
    let report = reports
        .iter()
        .find(|report| report.name == full)
        .with_context(|| {
            let names: Vec<&str> = reports.iter().map(|report| report.name.as_str()).collect();
            format!("no VM {full} on this node; there are: {}", names.join(", "))
        })?;
    Ok(report.status.uid)
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
        // A VM process of this node that was killed left its row behind.
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

fn import_all(node: &Supervisor, document: &Document, ownership: Ownership) -> Result<()> {
    for wanted in &document.disks {
        let disk = match &wanted.fill {
            None => {
                let change = Change::AttachDisk {
                    name: wanted.row.clone(),
                    vm: document.spec.uid,
                };
                ask_for(node, document, wanted, change)?
            }
            Some((size, _)) => {
                let change = Change::CreateDisk {
                    vm: document.spec.uid,
                    name: wanted.row.clone(),
                    size: *size,
                    role: wanted.role,
                    importing: true,
                };
                ask_for(node, document, wanted, change)?
            }
        };
        if disk.importing {
            import_one(node, document, ownership, wanted, disk.disk)?;
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
    eprintln!("Filling {}…", wanted.row);
    node.import(&ImportOrder {
        volume: &document.spec.volume,
        vm: document.spec.uid,
        owner: ownership.owner,
        epoch: ownership.epoch,
        disk,
        source,
    })
    .with_context(|| wanted.row.to_string())?;
    let state = wait_for(IMPORT_LIMIT, || {
        node.reap();
        let report = node
            .import_reports()
            .ok()?
            .into_iter()
            .find(|report| report.disk == disk)?;
        (report.state != ImportState::Running).then_some(report.state)
    });
    match state {
        Some(ImportState::Complete { length }) => {
            eprintln!("Filled {} with {length}.", wanted.row);
            Ok(())
        }
        Some(ImportState::Failed { message }) => bail!("{}: {message}", wanted.row),
        Some(ImportState::Running) | None => bail!("{}: the import does not end", wanted.row),
    }
}

/// A process whose guest could not be started stays to say why.
fn check_started(node: &Supervisor, vm: VmUid) -> Result<()> {
    match node.vm_status(vm).map(|status| (status.pid, status.state)) {
        Some((pid, VmState::Stopped(StopReason::Failed { what }))) => {
            node.collect_vm(vm, pid)?;
            bail!("the guest does not start: {what}")
        }
        _ => Ok(()),
    }
}

fn say_how_it_ended(node: &Supervisor, vm: VmUid) -> Result<()> {
    let last = wait_for(LAST_STATUS_LIMIT, || match node.presence(vm) {
        Presence::Answering(status) if is_over(&status.state) => Some(Presence::Answering(status)),
        Presence::Answering(_) | Presence::Silent(_) => None,
        gone => Some(gone),
    });
    let (pid, state) = match last {
        Some(Presence::Answering(status)) => (status.pid, status.state),
        Some(Presence::Ended(Some(state))) => (0, state),
        // `stop` and `migrate` forget it themselves.
        Some(Presence::Absent) => {
            eprintln!("\r\nThe guest is no longer on this node.");
            return Ok(());
        }
        _ => bail!("the VM's process ended without a word"),
    };
    forget(node, vm, pid)?;
    match state {
        VmState::Stopped(StopReason::GuestShutdown | StopReason::Requested) => {
            eprintln!("\r\nThe guest is off.");
            Ok(())
        }
        VmState::Departed => {
            eprintln!("\r\nThe guest has moved to another node.");
            Ok(())
        }
        state => bail!("the guest ended: {state:?}"),
    }
}

/// Forgets a VM process whose run is over, or finds that another command has.
pub(super) fn forget(node: &Supervisor, vm: VmUid, pid: u32) -> Result<()> {
    node.exclusively(vm, || node.collect_vm(vm, pid))?;
    Ok(())
}

/// The volume's rows.
pub(super) fn rows(node: &Supervisor, volume: &str) -> Result<Rows> {
    match node.volume_request(volume, &Request::Rows)? {
        Outcome::Rows(rows) => Ok(rows),
        other => bail!("the volume answered {other:?}"),
    }
}

pub(super) fn vm_row(rows: &Rows, vm: VmUid) -> Result<VmRow> {
    rows.vms
        .iter()
        .find(|row| row.vm == vm)
        .cloned()
        .context("the volume has no such VM")
}

/// A grant, or why there is none.
pub(super) fn granted(outcome: Result<Outcome, Rejection>) -> Result<Answer> {
    match outcome? {
        Outcome::Granted(answer) => Ok(answer),
        Outcome::Refused(Refusal::OwnedBy { owner, epoch }) => bail!(
            "the VM is owned by {owner} in epoch {epoch}: it runs on another node, or that node \
             died; `bascule-node volume rows` tells more"
        ),
        Outcome::Refused(refusal) => bail!("the volume refuses: {refusal}"),
        Outcome::Unknown => bail!("no coordinator of the volume answers; try again"),
        other => bail!("the volume answered {other:?}"),
    }
}

/// Asks for a disk of the document, by a change that is answered with its row.
fn ask_for(
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

/// A first lease takes an election and, after a crash, the wait for the earlier one to lapse.
const LEASE_LIMIT: Duration = Duration::from_secs(60);
/// An image of 100 GB at 100 MB/s takes 17 minutes.
const IMPORT_LIMIT: Duration = Duration::from_secs(3600);
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(120);
const LAST_STATUS_LIMIT: Duration = Duration::from_secs(30);
