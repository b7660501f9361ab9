//! The end of `run --rm`: removes everything that the run has created for the VM.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bascule_ipc::vm::Request;
use bascule_types::{Change, DiskRow, Owner, RowName, VmRow};

use super::document::Document;
use super::first_run::MadeVolume;
use super::local_node::{forget, granted, rows};
use crate::output::tell;
use crate::processes::supervisor::Supervisor;
use crate::processes::vms::{Presence, is_over};
use crate::wait::wait_for;

/// Refuses a VM or a disk that was on the volume before this run: `--rm` would remove its data.
pub(super) fn check_new(node: &Supervisor, document: &Document) -> Result<()> {
    let volume = &document.spec.volume;
    let present = rows(node, volume)?;
    if present.vms.iter().any(|row| row.vm == document.spec.uid) {
        bail!(
            "VM {} is on volume {volume} already; --rm removes a VM's disks and is only for new VMs: \
             run it without --rm, or under another name",
            document.row
        );
    }
    let mut names = present.disks.iter().map(|disk| &disk.name);
    match names.find(|name| made_names(document).any(|made| made == *name)) {
        Some(name) => bail!(
            "disk {name} is on volume {volume} already; --rm removes a VM's disks: rename the disk \
             or the VM"
        ),
        None => Ok(()),
    }
}

/// Stops the VM and removes its disks and its ownership record, and the volume's file if this run
/// has created it.
pub(super) fn remove(
    node: &Supervisor,
    document: &Document,
    owner: Option<Owner>,
    made: Option<&MadeVolume>,
) -> Result<()> {
    stop(node, document)?;
    cancel_imports(node, document)?;
    if let Some(made) = made {
        node.detach_volume(&document.spec.volume)?;
        fs::remove_file(&made.path).with_context(|| format!("remove {}", made.path.display()))?;
    } else if let Some(owner) = owner {
        remove_rows(node, document, owner)?;
    }
    tell(format_args!(
        "Removed VM {} with the disks that it was made with.",
        document.row
    ));
    Ok(())
}

fn stop(node: &Supervisor, document: &Document) -> Result<()> {
    let vm = document.spec.uid;
    if let Presence::Responding(status) = node.presence(vm)
        && !is_over(&status.state)
    {
        node.vm_request(vm, &Request::Stop)?;
    }
    let over = wait_for(STOP_LIMIT, || match node.presence(vm) {
        Presence::Responding(status) if is_over(&status.state) => Some(Some(status.pid)),
        Presence::Responding(_) | Presence::Unresponsive(_) => None,
        Presence::Ended(_) => Some(Some(0)),
        Presence::Absent => Some(None),
    });
    match over {
        Some(Some(pid)) => forget(node, vm, pid),
        Some(None) => Ok(()),
        None => bail!(
            "the VM process does not end; stop it with `bascule-node stop {} --force`",
            document.row
        ),
    }
}

fn cancel_imports(node: &Supervisor, document: &Document) -> Result<()> {
    let rows = rows(node, &document.spec.volume)?;
    let mut disks = rows.disks.iter();
    disks.try_for_each(|disk| {
        if disk.importing && disk.vm == Some(document.spec.uid) {
            node.cancel_import(disk.disk, STOP_LIMIT)?;
        }
        Ok(())
    })
}

fn remove_rows(node: &Supervisor, document: &Document, owner: Owner) -> Result<()> {
    let (volume, vm) = (&document.spec.volume, document.spec.uid);
    let present = rows(node, volume)?;
    let Some(row) = present.vms.iter().find(|row| row.vm == vm) else {
        return Ok(());
    };
    release(node, document, row, owner)?;
    for disk in &present.disks {
        if disk.vm == Some(vm) && made_names(document).any(|name| *name == disk.name) {
            granted(node.change(volume, Change::DeleteDisk { disk: disk.disk }))
                .with_context(|| format!("remove disk {}", disk.name))?;
        }
    }
    granted(node.change(volume, Change::DeleteVm { vm }))?;
    Ok(())
}

/// Releases the VM if `owner` owns it.
fn release(node: &Supervisor, document: &Document, row: &VmRow, owner: Owner) -> Result<()> {
    if row.owner != Some(owner) {
        return Ok(());
    }
    let release = Change::Release {
        vm: row.vm,
        from: owner,
        epoch: row.epoch,
    };
    // Refused until the writes of a cancelled import have settled.
    let mut refused = None;
    wait_for(RELEASE_LIMIT, || {
        granted(node.change(&document.spec.volume, release.clone()))
            .map_err(|error| refused = Some(error))
            .ok()
    })
    .ok_or_else(|| refused.unwrap_or_else(|| anyhow!("not released")))
    .with_context(|| format!("release VM {}", document.row))?;
    Ok(())
}

/// Gives back the space of the disks whose imports failed, and with it the VM: a disk is deleted only while
/// its VM has no owner. The next run begins anew.
pub(super) fn remove_unfinished(
    node: &Supervisor,
    document: &Document,
    owner: Owner,
) -> Result<()> {
    let (volume, vm) = (&document.spec.volume, document.spec.uid);
    let present = rows(node, volume)?;
    if let Some(row) = present.vms.iter().find(|row| row.vm == vm) {
        release(node, document, row, owner)?;
    }
    let unfinished = |disk: &&DiskRow| disk.importing && disk.vm == Some(vm);
    for disk in present.disks.iter().filter(unfinished) {
        granted(node.change(volume, Change::DeleteDisk { disk: disk.disk }))
            .with_context(|| format!("remove disk {}", disk.name))?;
    }
    Ok(())
}

/// The disks that are created for this document, without the kept disks that it attaches.
fn made_names(document: &Document) -> impl Iterator<Item = &RowName> {
    let made = document.disks.iter().filter(|disk| disk.fill.is_some());
    made.map(|disk| &disk.row)
}

/// A process ends when its writes in flight are completed.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// Longer than the settle time of any volume.
const RELEASE_LIMIT: Duration = Duration::from_secs(60);
