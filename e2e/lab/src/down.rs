//! Taking a lab down. Resources are found by the lab's name, so remains of a killed run are removed as well.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

use crate::cache::remove_all;
use crate::cgroup::Cgroup;
use crate::command::Run;
use crate::hub::netns_with_prefix;
use crate::names::LabName;
use crate::state::LabPaths;
use crate::wait::wait_for;

/// Takes the lab `name` down and removes everything but its logs. Does nothing if there is no such lab.
pub fn down(name: &LabName) -> Result<()> {
    let paths = LabPaths::new(name)?;
    let _lock = paths.lock()?;
    clear(name, &paths)
}

/// Takes down all labs of this user and returns their names.
pub fn down_all() -> Result<Vec<LabName>> {
    let names = LabPaths::all_labs()?;
    names.iter().try_for_each(down)?;
    Ok(names)
}

/// [`down`] for a caller that holds the lab's lock.
pub(crate) fn clear(name: &LabName, paths: &LabPaths) -> Result<()> {
    let cgroup = Cgroup::at(name.cgroup())?;
    cgroup.kill_all()?;
    for netns in netns_with_prefix(&name.netns_prefix())? {
        Run::new("ip").args(["netns", "del", &netns]).done()?;
    }
    detach_loops(&paths.disks())?;
    cgroup.remove()?;
    // A mount namespace disappears shortly after its last process.
    wait_for("the removal of the lab's files", REMOVE_DEADLINE, || {
        remove_all(&paths.dir())
    })?;
    prune_logs(&paths.logs())
}

/// Detaches the loop devices whose backing file is in `dir`.
fn detach_loops(dir: &Path) -> Result<()> {
    let list = Run::new("losetup").args(["--list", "--noheadings", "--output", "NAME,BACK-FILE"]);
    for line in list.text()?.lines() {
        let Some((device, file)) = line.trim().split_once(char::is_whitespace) else {
            continue;
        };
        if Path::new(file.trim()).starts_with(dir) {
            Run::new("losetup").args(["--detach", device]).done()?;
        }
    }
    Ok(())
}

/// Keeps the logs of the last runs.
fn prune_logs(logs: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(logs) else {
        return Ok(());
    };
    let age = |entry: &fs::DirEntry| entry.metadata().and_then(|m| m.modified()).ok();
    let mut runs: Vec<(Option<SystemTime>, _)> = entries
        .filter_map(Result::ok)
        .map(|entry| (age(&entry), entry.path()))
        .collect();
    runs.sort();
    let surplus = runs.len().saturating_sub(LOG_RUNS_KEPT);
    for (_, run) in &runs[..surplus] {
        remove_all(run).context("prune old logs")?;
    }
    Ok(())
}

/// Logs of this many runs of a lab are kept.
const LOG_RUNS_KEPT: usize = 8;
/// A guess; milliseconds in practice.
const REMOVE_DEADLINE: Duration = Duration::from_secs(20);
