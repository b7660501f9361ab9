//! The cgroups of a lab. All processes of a lab are in one subtree of every hierarchy, so that they can be frozen,
//! killed and listed together.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use crate::wait::wait_for;

/// A mounted cgroup hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub mount: PathBuf,
    /// Mount options that select a v1 hierarchy (`cpu,cpuacct`, `none,name=systemd`), none for v2.
    pub v1_options: Option<String>,
}

impl Hierarchy {
    fn controls(&self, controller: &str) -> bool {
        self.v1_options
            .as_ref()
            .is_some_and(|o| o.split(',').any(|word| word == controller))
    }
}

/// All hierarchies of this machine, as the current process sees them.
pub fn hierarchies() -> Result<Vec<Hierarchy>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("read mountinfo")?;
    let found = parse_mountinfo(&text);
    ensure!(!found.is_empty(), "no cgroup hierarchy is mounted");
    Ok(found)
}

/// One cgroup, the same path in every hierarchy.
#[derive(Debug, Clone)]
pub struct Cgroup {
    hierarchies: Vec<Hierarchy>,
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup at `path` below every hierarchy's root, existing or not.
    pub fn at(path: impl Into<PathBuf>) -> Result<Self> {
        Ok(Self {
            hierarchies: hierarchies()?,
            path: path.into(),
        })
    }

    /// The cgroup `name` below this one.
    pub fn child(&self, name: &str) -> Self {
        Self {
            hierarchies: self.hierarchies.clone(),
            path: self.path.join(name),
        }
    }

    /// Makes it, and what is above it, in every hierarchy.
    pub fn create(&self) -> Result<()> {
        for hierarchy in &self.hierarchies {
            let mut dir = hierarchy.mount.clone();
            for part in &self.path {
                if hierarchy.v1_options.is_none() {
                    delegate_controllers(&dir)?;
                }
                dir.push(part);
                match fs::create_dir(&dir) {
                    Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                        return Err(error)
                            .with_context(|| format!("make cgroup {}", dir.display()));
                    }
                    _ => {}
                }
                if hierarchy.controls("cpuset") {
                    inherit_cpuset(&dir)?;
                }
            }
        }
        Ok(())
    }

    /// Moves the calling process into it, in every hierarchy.
    pub fn join(&self) -> Result<()> {
        for dir in self.dirs() {
            let file = dir.join("cgroup.procs");
            fs::write(&file, "0").with_context(|| format!("join {}", file.display()))?;
        }
        Ok(())
    }

    /// Every process in it or below it.
    pub fn processes(&self) -> Result<BTreeSet<i32>> {
        let mut found = BTreeSet::new();
        for dir in self.dirs() {
            collect_processes(&dir, &mut found)?;
        }
        Ok(found)
    }

    /// Freezes or thaws all processes in it and below it.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        for hierarchy in &self.hierarchies {
            let dir = hierarchy.mount.join(&self.path);
            let (file, word) = match hierarchy.v1_options {
                Some(_) if hierarchy.controls("freezer") => {
                    ("freezer.state", if frozen { "FROZEN" } else { "THAWED" })
                }
                None if dir.join("cgroup.freeze").exists() => {
                    ("cgroup.freeze", if frozen { "1" } else { "0" })
                }
                _ => continue,
            };
            let file = dir.join(file);
            match fs::write(&file, word) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("write {}", file.display()));
                }
                _ => {}
            }
        }
        if frozen { self.wait_frozen() } else { Ok(()) }
    }

    fn wait_frozen(&self) -> Result<()> {
        wait_for("the freezer", Duration::from_secs(10), || {
            for hierarchy in self.hierarchies.iter().filter(|h| h.controls("freezer")) {
                let file = hierarchy.mount.join(&self.path).join("freezer.state");
                let state = fs::read_to_string(&file)?;
                ensure!(
                    state.trim() == "FROZEN",
                    "{} is {}",
                    file.display(),
                    state.trim()
                );
            }
            Ok(())
        })
    }

    /// Kills all processes in it and below it, frozen ones included, and waits until none is left.
    pub fn kill_all(&self) -> Result<()> {
        self.freeze(false)?;
        wait_for(
            &format!("the end of all in {}", self.path.display()),
            KILL_DEADLINE,
            || {
                let left = self.processes()?;
                for pid in &left {
                    kill(*pid)?;
                }
                ensure!(left.is_empty(), "left: {left:?}");
                Ok(())
            },
        )
    }

    /// Removes it and all cgroups below it. It must have no processes.
    pub fn remove(&self) -> Result<()> {
        for dir in self.dirs() {
            // The kernel lets a cgroup go a moment after its last process.
            wait_for(
                &format!("removal of {}", dir.display()),
                KILL_DEADLINE,
                || remove_tree(&dir),
            )?;
        }
        Ok(())
    }

    /// Whether there is any trace of it.
    pub fn exists(&self) -> bool {
        self.dirs().any(|dir| dir.exists())
    }

    fn dirs(&self) -> impl Iterator<Item = PathBuf> {
        self.hierarchies.iter().map(|h| h.mount.join(&self.path))
    }
}

fn kill(pid: i32) -> Result<()> {
    let Some(pid) = Pid::from_raw(pid) else {
        bail!("process id {pid}")
    };
    match kill_process(pid, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("kill {pid:?}")),
    }
}

fn collect_processes(dir: &Path, found: &mut BTreeSet<i32>) -> Result<()> {
    match fs::read_to_string(dir.join("cgroup.procs")) {
        Ok(text) => found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok())),
        // ENODEV: removed while it was open.
        Err(error) if gone(&error) => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("read {}", dir.display())),
    }
    for child in child_dirs(dir)? {
        collect_processes(&child, found)?;
    }
    Ok(())
}

fn remove_tree(dir: &Path) -> Result<()> {
    for child in child_dirs(dir)? {
        remove_tree(&child)?;
    }
    match fs::remove_dir(dir) {
        Err(error) if !gone(&error) => {
            Err(error).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

fn child_dirs(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if gone(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("list {}", dir.display())),
    };
    let entries = entries.filter_map(Result::ok);
    Ok(entries
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| e.path())
        .collect())
}

fn gone(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error())
}

/// A new v1 cpuset has no CPUs and memory nodes and accepts no process until they are set.
fn inherit_cpuset(dir: &Path) -> Result<()> {
    let Some(parent) = dir.parent() else {
        bail!("{} has no parent", dir.display())
    };
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let value =
            fs::read_to_string(parent.join(file)).with_context(|| format!("read {file}"))?;
        fs::write(dir.join(file), value.trim()).with_context(|| format!("write {file}"))?;
    }
    Ok(())
}

/// Enables all controllers of `dir` for its children (cgroup v2).
pub(crate) fn delegate_controllers(dir: &Path) -> Result<()> {
    let controllers = fs::read_to_string(dir.join("cgroup.controllers"))
        .with_context(|| format!("read the controllers of {}", dir.display()))?;
    for controller in controllers.split_whitespace() {
        fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"))
            .with_context(|| format!("delegate {controller} in {}", dir.display()))?;
    }
    Ok(())
}

/// `mountinfo` as in proc(5): field 5 is the mount point; after the dash come type, source, super options.
fn parse_mountinfo(text: &str) -> Vec<Hierarchy> {
    text.lines()
        .filter_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            let mount = PathBuf::from(mount.split_whitespace().nth(4)?);
            let mut words = file_system.split_whitespace();
            match words.next()? {
                "cgroup2" => Some(Hierarchy {
                    mount,
                    v1_options: None,
                }),
                "cgroup" => Some(Hierarchy {
                    mount,
                    v1_options: Some(v1_options(words.nth(1)?)),
                }),
                _ => None,
            }
        })
        .collect()
}

fn v1_options(super_options: &str) -> String {
    let selects = |word: &&str| {
        !matches!(*word, "rw" | "ro" | "xattr" | "clone_children")
            && !word.starts_with("release_agent=")
    };
    let words: Vec<&str> = super_options.split(',').filter(selects).collect();
    let named = words.iter().all(|word| word.starts_with("name="));
    let none = named.then_some("none");
    none.into_iter().chain(words).collect::<Vec<_>>().join(",")
}

/// Killed processes are gone within milliseconds unless one is stuck in the kernel.
const KILL_DEADLINE: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_read_from_mountinfo() {
        let text = "\
24 1 0:20 / /proc rw - proc proc rw
34 29 0:28 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
35 29 0:29 / /sys/fs/cgroup/systemd rw shared:10 - cgroup cgroup rw,xattr,name=systemd
36 29 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
";
        let v1 = |mount: &str, options: &str| Hierarchy {
            mount: mount.into(),
            v1_options: Some(options.to_owned()),
        };
        assert_eq!(
            parse_mountinfo(text),
            [
                v1("/sys/fs/cgroup/cpu,cpuacct", "cpu,cpuacct"),
                v1("/sys/fs/cgroup/systemd", "none,name=systemd"),
                Hierarchy {
                    mount: "/sys/fs/cgroup/unified".into(),
                    v1_options: None
                },
            ]
        );
    }
}
