//! The cgroups of the processes that outlive the daemon, and what they are entitled to when a node is busy.
//!
//! ```text
//!  <base> ─┬─ kubepods                        by the kubelet: 1024 shares per allocatable CPU
//!          ├─ bascule           VMS ───────┬─ vm-UID      1024 shares per vCPU; memory.min: its RAM and 64 MiB
//!          │                               └─ import-UID  256 shares
//!          └─ bascule-critical  CRITICAL ──┬─ volume-NAME 64 MiB of memory.min
//!                                          └─ watchdog    likewise
//! ```
//! A slice has the sum of its members' shares, at most 1024 for each CPU of the node; and the sum of their memory, without
//! which the kernel would not protect that of a member (Linux, cgroup-v2, "memory.min").
//! `CRITICAL` has the largest weight: renewing leases and petting the watchdog take little, and must not wait.
//!
//! Version 1 has `cpu.shares` only. There is no upper limit of memory: a process that reached it would be killed, and its
//! guest with it, or throttled together with the guest's disks.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bascule_types::Bytes;

/// The slice of guests and imports.
pub(super) const VMS: &str = "bascule";
/// The slice of the processes on which the leases of all guests depend.
pub(super) const CRITICAL: &str = "bascule-critical";

/// What a program is entitled to when others want CPUs and memory too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args)]
pub(crate) struct Share {
    /// CPU time relative to others, in shares as of cgroup version 1 (1024 for a CPU); 0 for the default
    #[arg(long, default_value_t = 0)]
    cpu_shares: u64,
    /// Memory that is not reclaimed, in bytes
    #[arg(long, default_value_t = 0)]
    memory_min: u64,
}

impl Share {
    /// Of a guest with so many vCPUs and so much RAM.
    pub(crate) fn of_guest(cpus: u8, memory: Bytes) -> Self {
        Self {
            cpu_shares: u64::from(cpus) * SHARES_OF_CPU,
            memory_min: memory.0.saturating_add(OVERHEAD.0),
        }
    }

    /// Of an import, which can wait.
    pub(crate) const fn of_import() -> Self {
        Self {
            cpu_shares: SHARES_OF_CPU / 4,
            memory_min: 0,
        }
    }

    /// Of a process in [`CRITICAL`].
    pub(crate) const fn of_critical() -> Self {
        Self {
            cpu_shares: SHARES_OF_CPU,
            memory_min: OVERHEAD.0,
        }
    }

    /// As arguments of `bascule-node launch`.
    pub(crate) fn arguments(self) -> [String; 2] {
        [
            format!("--cpu-shares={}", self.cpu_shares),
            format!("--memory-min={}", self.memory_min),
        ]
    }
}

/// Removes the cgroup from every hierarchy.
pub(super) fn remove(name: &str) -> Result<()> {
    for folder in cgroup_folders(name)? {
        match fs::remove_dir(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", folder.display()));
            }
            _ => {}
        }
        sum_up(&folder)?;
    }
    Ok(())
}

/// Makes and joins the cgroup in the v2 hierarchy, or in each mounted v1 hierarchy. That its share cannot be set, for
/// lack of a controller, is only noted in `log`.
pub(super) fn join(name: &str, share: Share, mut log: &File) -> Result<()> {
    for folder in cgroup_folders(name)? {
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        fill_cpuset(&folder)?;
        if let Err(error) = give(&folder, share) {
            writeln!(log, "bascule-node launch: {error:#}").context("write the log")?;
        }
        let procs = folder.join("cgroup.procs");
        fs::write(&procs, std::process::id().to_string())
            .with_context(|| format!("write {}", procs.display()))?;
    }
    Ok(())
}

/// The folder `<base>/<name>` in each hierarchy. The base is process 1's own cgroup where that is
/// not systemd's: a node that is itself in a container keeps its VMs among its own.
fn cgroup_folders(name: &str) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/1/cgroup").context("read /proc/1/cgroup")?;
    let folders = parse_cgroups(&table)
        .into_iter()
        .filter_map(|(controllers, base)| {
            let base = cgroup_base(&base).trim_start_matches('/');
            Some(hierarchy_root(&controllers)?.join(base).join(name))
        });
    Ok(folders.collect())
}

/// The lines of `/proc/PID/cgroup` as (controllers, path); the v2 hierarchy has no controllers.
fn parse_cgroups(table: &str) -> Vec<(String, String)> {
    table
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':');
            let _id = fields.next()?;
            Some((fields.next()?.to_owned(), fields.next()?.to_owned()))
        })
        .collect()
}

fn cgroup_base(path: &str) -> &str {
    match path {
        "/init.scope" => "/",
        other => other.strip_suffix("/init.scope").unwrap_or(other),
    }
}

fn hierarchy_root(controllers: &str) -> Option<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let candidates = match controllers {
        "" => vec![root.to_owned(), root.join("unified")],
        named => vec![root.join(named.trim_start_matches("name="))],
    };
    candidates
        .into_iter()
        .find(|path| path.join("cgroup.procs").exists())
}

/// A new v1 cpuset group is empty and takes no process until it has CPUs and memory nodes.
fn fill_cpuset(folder: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let path = folder.join(file);
        let Ok(present) = fs::read_to_string(&path) else {
            continue;
        };
        if !present.trim().is_empty() {
            continue;
        }
        let mut parent = folder.parent();
        while let Some(above) = parent {
            match fs::read_to_string(above.join(file)) {
                Ok(text) if !text.trim().is_empty() => {
                    copy_down(above, folder, file, text.trim())?;
                    break;
                }
                Ok(_) => parent = above.parent(),
                Err(_) => break,
            }
        }
    }
    Ok(())
}

fn copy_down(above: &Path, folder: &Path, file: &str, value: &str) -> Result<()> {
    let below = folder.strip_prefix(above).context("cpuset folder")?;
    let mut at = above.to_owned();
    for part in below {
        at.push(part);
        let path = at.join(file);
        match fs::write(&path, value) {
            Ok(()) => {}
            // The v2 files are there only for readers when the controller is not delegated.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            Err(error) => return Err(error).with_context(|| format!("write {}", path.display())),
        }
    }
    Ok(())
}

/// Gives the group its share, and its slice the sum.
fn give(group: &Path, share: Share) -> Result<()> {
    if let Some(slice) = group.parent() {
        let above = slice.parent().into_iter().chain([slice]);
        above.for_each(enable_controllers);
    }
    if share.cpu_shares > 0 {
        set(group, "cpu.shares", share.cpu_shares)?;
        set(group, "cpu.weight", weight(share.cpu_shares))?;
    }
    if share.memory_min > 0 {
        set(group, "memory.min", share.memory_min)?;
    }
    sum_up(group)
}

/// Gives the slice of `group` what its present members have together.
fn sum_up(group: &Path) -> Result<()> {
    let Some(slice) = group.parent().filter(|slice| slice.exists()) else {
        return Ok(());
    };
    let mut members = Vec::new();
    for entry in fs::read_dir(slice).with_context(|| format!("list {}", slice.display()))? {
        let path = entry
            .with_context(|| format!("list {}", slice.display()))?
            .path();
        if path.is_dir() {
            members.push(path);
        }
    }
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
    let critical = slice.file_name().is_some_and(|name| name == CRITICAL);
    let limit = (!critical).then_some(cpus * SHARES_OF_CPU);
    let each = |file| members.iter().filter_map(move |member| get(member, file));
    let shares = of_slice(each("cpu.shares").sum(), limit);
    set(slice, "cpu.shares", shares)?;
    let shares = of_slice(each("cpu.weight").map(shares_of).sum(), limit);
    set(slice, "cpu.weight", weight(shares))?;
    set(slice, "memory.min", each("memory.min").sum())
}

/// The shares of a slice whose members have `sum` together: the most that there are, without a limit.
fn of_slice(sum: u64, limit: Option<u64>) -> u64 {
    limit.map_or(SHARES_MAX, |limit| {
        sum.clamp(SHARES_MIN, limit.min(SHARES_MAX))
    })
}

/// Shares of version 1 as a weight of version 2. Kubernetes' pods get theirs by the same function since Kubernetes 1.35 and
/// runc 1.3.2, in which the defaults of both versions correspond: 1024 shares are a weight of 100. With older ones, a pod
/// of one CPU has a weight of 39.
fn weight(shares: u64) -> u64 {
    let log = to_f64(shares.clamp(SHARES_MIN, SHARES_MAX)).log2();
    let exponent = (log + LINEAR) * log / SCALE - OFFSET;
    // Both ends of the range are exact but for rounding, which must not add 1.
    to_u64((10_f64.powf(exponent) - 1e-6).ceil()).clamp(1, WEIGHT_MAX)
}

/// The shares of which [`weight`] makes this one, within its rounding.
fn shares_of(weight: u64) -> u64 {
    let exponent = to_f64(weight.clamp(1, WEIGHT_MAX)).log10() + OFFSET;
    let log = (LINEAR / 2.).hypot((SCALE * exponent).sqrt()) - LINEAR / 2.;
    to_u64(log.exp2().round()).clamp(SHARES_MIN, SHARES_MAX)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "shares and weights are less than 2^53"
)]
const fn to_f64(value: u64) -> f64 {
    value as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a whole number that is not negative; a cast saturates"
)]
const fn to_u64(value: f64) -> u64 {
    value as u64
}

/// Lets the children of a version 2 group have shares. Where it cannot, the files are missing there.
fn enable_controllers(group: &Path) {
    for controller in ["+cpu", "+memory"] {
        if let Err(error) = write_existing(&group.join("cgroup.subtree_control"), controller) {
            tracing::debug!(group = %group.display(), controller, %error, "not enabled");
        }
    }
}

/// Sets a value of the group, if the hierarchy has it.
fn set(group: &Path, file: &str, value: u64) -> Result<()> {
    let path = group.join(file);
    match write_existing(&path, &value.to_string()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written.with_context(|| format!("write {value} to {}", path.display())),
    }
}

fn get(group: &Path, file: &str) -> Option<u64> {
    let text = fs::read_to_string(group.join(file)).ok()?;
    text.trim().parse().ok()
}

fn write_existing(path: &Path, value: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).truncate(true).open(path)?;
    file.write_all(value.as_bytes())
}

/// As Kubernetes and cgroup version 1 count a CPU.
const SHARES_OF_CPU: u64 = 1024;
/// The least and the most of version 1 (`MIN_SHARES` and `MAX_SHARES`, kernel/sched/sched.h).
const SHARES_MIN: u64 = 2;
const SHARES_MAX: u64 = 262_144;
/// Of the exponent of a weight, a quadratic function of the logarithm of shares through (2, 1), (1024, 100) and (262,144,
/// 10,000).
const LINEAR: f64 = 125.;
const SCALE: f64 = 612.;
const OFFSET: f64 = 7. / 34.;
/// The most of version 2 (Linux, cgroup-v2, "cpu.weight").
const WEIGHT_MAX: u64 = 10_000;
/// What a process needs besides its guest's RAM; a reservation pod requests as much.
const OVERHEAD: Bytes = Bytes::mib(64);

#[cfg(test)]
mod tests {
    use super::*;

    /// A group as a hierarchy makes it, with these files.
    fn group(path: &Path, files: &[&str]) {
        fs::create_dir_all(path).unwrap();
        for file in files {
            fs::write(path.join(file), "100\n").unwrap();
        }
    }

    #[test]
    fn a_slice_has_what_its_guests_have_together_and_no_more_cpu_time_than_all_pods() {
        let folder = tempfile::tempdir().unwrap();
        let slice = folder.path().join(VMS);
        let files = ["cpu.weight", "memory.min"];
        group(&slice, &files);
        let guest = |name: &str, memory| {
            group(&slice.join(name), &files);
            give(&slice.join(name), Share::of_guest(1, memory)).unwrap();
        };
        guest("vm-a", Bytes::gib(1));
        assert_eq!(get(&slice.join("vm-a"), "cpu.weight"), Some(100));
        let first = Bytes::gib(1).0 + OVERHEAD.0;
        assert_eq!(get(&slice.join("vm-a"), "memory.min"), Some(first));
        assert_eq!(get(&slice, "memory.min"), Some(first));
        guest("vm-b", Bytes::gib(2));
        let both = first + Bytes::gib(2).0 + OVERHEAD.0;
        assert_eq!(get(&slice, "memory.min"), Some(both));
        fs::remove_dir_all(slice.join("vm-b")).unwrap();
        sum_up(&slice.join("vm-b")).unwrap();
        assert_eq!(get(&slice, "memory.min"), Some(first));
        assert_eq!(get(&slice, "cpu.weight"), Some(100));

        let limit = Some(4 * SHARES_OF_CPU);
        assert_eq!(of_slice(100 * SHARES_OF_CPU, limit), 4 * SHARES_OF_CPU);
        assert_eq!(of_slice(3 * SHARES_OF_CPU, limit), 3 * SHARES_OF_CPU);
        assert_eq!(of_slice(0, limit), SHARES_MIN, "without a member");
    }

    #[test]
    fn lease_renewal_and_watchdog_come_before_every_guest() {
        let folder = tempfile::tempdir().unwrap();
        let slice = folder.path().join(CRITICAL);
        for (file, most) in [("cpu.weight", WEIGHT_MAX), ("cpu.shares", SHARES_MAX)] {
            group(&slice.join("watchdog"), &[file]);
            group(&slice, &[file]);
            give(&slice.join("watchdog"), Share::of_critical()).unwrap();
            assert_eq!(get(&slice, file), Some(most));
        }
    }

    #[test]
    fn a_hierarchy_without_a_controller_is_left_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let pids = folder.path().join("bascule/vm-a");
        group(&pids, &["pids.max"]);
        give(&pids, Share::of_guest(2, Bytes::gib(1))).unwrap();
        assert_eq!(fs::read_dir(&pids).unwrap().count(), 1);
    }

    /// A guest had 39 where a pod of one CPU has 100, and a task outside all groups, too.
    #[test]
    fn shares_become_weights_as_the_kubelet_does_it() {
        let shares = [0, 2, 3, 256, 1024, 2000, 2048, 102_400, 262_144, u64::MAX];
        let weights = [1, 1, 2, 35, 100, 170, 174, 4_429, 10_000, 10_000];
        assert_eq!(shares.map(weight), weights);
    }

    #[test]
    fn weights_become_the_shares_that_they_were_made_of() {
        for cpus in [1, 2, 3, 8, 10, 64, 255] {
            let shares = cpus * SHARES_OF_CPU;
            let again = shares_of(weight(shares));
            assert!(
                again.abs_diff(shares) * 50 <= shares,
                "{shares} became {again}"
            );
        }
        assert_eq!([1, WEIGHT_MAX].map(shares_of), [SHARES_MIN, SHARES_MAX]);
    }

    #[test]
    fn both_cgroup_versions_are_read_from_a_process_table() {
        let table = "4:memory:/lab-a\n1:name=systemd:/lab-a\n0::/init.scope\n";
        assert_eq!(
            parse_cgroups(table),
            [
                ("memory".to_owned(), "/lab-a".to_owned()),
                ("name=systemd".to_owned(), "/lab-a".to_owned()),
                (String::new(), "/init.scope".to_owned()),
            ]
        );
    }

    #[test]
    fn removing_a_cgroup_that_is_not_there_is_no_error() {
        remove("bascule/vm-that-never-was").unwrap();
    }

    #[test]
    fn the_init_scope_of_systemd_is_not_the_parent_cgroup_of_virtual_machines() {
        assert_eq!(cgroup_base("/init.scope"), "/");
        assert_eq!(cgroup_base("/kubelet/init.scope"), "/kubelet");
        assert_eq!(cgroup_base("/bascule-lab-n1"), "/bascule-lab-n1");
    }
}
