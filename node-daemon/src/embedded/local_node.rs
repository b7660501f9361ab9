//! Helpers that the commands of embedded mode share: this node's processes, volumes and VMs.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bascule_ipc::volume::{Request, Rows};
use bascule_node_api::command::{Backing, Outcome};
use bascule_types::{Answer, Owner, Refusal, VmRow, VmUid};

use super::interrupt::Interrupt;
use crate::config::NodeConfig;
use crate::identity::Identity;
use crate::paths::Paths;
use crate::processes::launcher::Launcher;
use crate::processes::supervisor::{Parts, Rejection, Supervisor};
use crate::wait::wait_for;

/// A supervisor for one command. The processes that it starts outlive the command.
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
    let launcher = Launcher::new(config, false, !no_cgroups)?;
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
pub(super) fn attach(node: &Supervisor, volume: &str, backing: Option<&Path>) -> Result<()> {
    if node.volume_status(volume).is_ok() {
        return Ok(());
    }
    let path = backing.with_context(|| {
        format!("volume {volume} is not attached: name its device or file with --backing PATH")
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
pub(super) fn own_slot(node: &Supervisor, volume: &str, interrupt: &Interrupt) -> Result<Owner> {
    let mut last = String::new();
    let owner = wait_for(LEASE_LIMIT, || match node.volume_status(volume) {
        _ if interrupt.arrived() => Some(None),
        Ok(status) if status.lease_left_ms > 0 => status.owner.map(Some),
        Ok(status) => {
            last = status.reason.unwrap_or_else(|| "no lease yet".to_owned());
            None
        }
        Err(reason) => {
            last = reason;
            None
        }
    });
    interrupt.check()?;
    owner
        .flatten()
        .with_context(|| format!("volume {volume} is not usable here: {last}"))
}

/// The UID of this node's VM with that name.
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

/// Removes a VM process whose run is over; succeeds also when another command has removed it.
pub(super) fn forget(node: &Supervisor, vm: VmUid, pid: u32) -> Result<()> {
    node.with_vm_lock(vm, || node.collect_vm(vm, pid))?;
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

/// The answer of a granted change, or the refusal as an error.
pub(super) fn granted(outcome: Result<Outcome, Rejection>) -> Result<Answer> {
    match outcome? {
        Outcome::Granted(answer) => Ok(answer),
        Outcome::Refused(Refusal::OwnedBy { owner, epoch }) => bail!(
            "the VM is owned by {owner} in epoch {epoch}: it runs on another node, or that node \
             died; `bascule-node volume vms` shows the owners"
        ),
        Outcome::Refused(refusal) => bail!("the volume refuses: {refusal}"),
        Outcome::Unknown => bail!("no coordinator of the volume answers; try again"),
        other => bail!("the volume answered {other:?}"),
    }
}

/// A first lease takes an election and, after a crash, the wait for the earlier one to lapse.
const LEASE_LIMIT: Duration = Duration::from_secs(60);
