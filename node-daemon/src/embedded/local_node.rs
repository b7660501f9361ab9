//! Helpers that the commands of embedded mode share: this node's processes, volumes and VMs.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bascule_ipc::volume::{Request, Rows};
use bascule_node_api::command::{Backing, Outcome};
use bascule_types::{Answer, Owner, Refusal, VmRow, VmUid};
use rustix::fs::Access;

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
    check_rights(config, no_cgroups)?;
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

/// Says what is missing to a user who is not root, before a file that cannot be written does.
pub(super) fn check_rights(config: &NodeConfig, no_cgroups: bool) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    match missing_rights(config, no_cgroups, is_writable) {
        None => Ok(()),
        Some(what) => bail!(
            "not root: {what}. Run this as root, or with --run-dir and --state-dir of your own and \
             --no-cgroups; a VM also needs access to /dev/kvm, and one with interfaces needs root"
        ),
    }
}

fn missing_rights(
    config: &NodeConfig,
    no_cgroups: bool,
    is_writable: impl Fn(&Path) -> bool,
) -> Option<String> {
    for (option, folder) in [
        ("--run-dir", &config.run_dir),
        ("--state-dir", &config.state_dir),
    ] {
        if !is_writable(folder) {
            return Some(format!("{} ({option}) is not writable", folder.display()));
        }
    }
    (!no_cgroups).then(|| "cgroups cannot be made".to_owned())
}

/// Whether files can be made in a folder, which may be still to be made itself.
fn is_writable(folder: &Path) -> bool {
    let access = Access::WRITE_OK | Access::EXEC_OK;
    let present = folder.ancestors().find(|folder| folder.exists());
    present.is_some_and(|folder| rustix::fs::access(folder, access).is_ok())
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct TestCli {
        #[command(flatten)]
        config: NodeConfig,
    }

    /// `bascule-node run` without root said "Permission denied" of a file that the user had not named.
    #[test]
    fn a_user_without_root_is_told_which_option_is_missing() {
        let config = TestCli::parse_from(["test"]).config;
        let missing = |no_cgroups, writable: &[&str]| {
            missing_rights(&config, no_cgroups, |folder| {
                writable.iter().any(|name| folder == Path::new(name))
            })
        };
        let run = "/run/bascule";
        let state = "/var/lib/bascule";
        let why = missing(true, &[]).unwrap();
        assert_eq!(why, "/run/bascule (--run-dir) is not writable");
        let why = missing(true, &[run]).unwrap();
        assert_eq!(why, "/var/lib/bascule (--state-dir) is not writable");
        assert!(missing(false, &[run, state]).unwrap().contains("cgroups"));
        assert_eq!(missing(true, &[run, state]), None);
    }

    #[test]
    fn a_folder_that_is_still_to_be_made_is_as_writable_as_the_one_above_it() {
        let folder = tempfile::tempdir().unwrap();
        assert!(is_writable(&folder.path().join("a/b")));
    }
}
