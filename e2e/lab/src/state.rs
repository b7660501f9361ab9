//! A lab's state file and directories. State is written before a resource is created, so that a later run can remove
//! it even if this one is killed.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::addresses::{Families, Family};
use crate::dirs::xdg_dir;
use crate::names::{LabName, NodeIndex, SHARED_DISK};
use crate::process::ProcessId;
use crate::wait::wait_for;

/// Kind of a lab's nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Namespaces of this machine, its own /dev/kvm.
    Native,
    /// QEMU machines with a kernel, a /dev/kvm, a watchdog and disks of their own.
    Emulated,
}

impl Tier {
    /// The address families of this tier's clusters unless another choice is made.
    pub const fn families(self) -> Families {
        Families::only(match self {
            Self::Native => Family::V6,
            Self::Emulated => Family::V4,
        })
    }
}

/// A node in the state file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct NodeRecord {
    pub index: NodeIndex,
    /// The node's PID 1 (native) or QEMU (emulated); killing it is a power cut. `None` while the node is off.
    pub machine: Option<ProcessId>,
}

/// State of a lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct State {
    /// [`STATE_VERSION`] of the writer.
    pub version: u32,
    /// The lab's name.
    pub name: LabName,
    /// Kind of its nodes.
    pub tier: Tier,
    pub families: Families,
    /// The host's boot id when the lab came up. After a reboot none of its processes exist.
    pub boot_id: String,
    /// Where the logs of this run are.
    pub logs: PathBuf,
    pub nodes: Vec<NodeRecord>,
    /// Whether `up` succeeded.
    pub complete: bool,
    /// Whether the lab is taken down when the process that brought it up ends.
    pub ephemeral: bool,
    /// SHA-256 of the `lab` program and of each image archive that the nodes were made from.
    #[serde(default)]
    pub contents: Vec<String>,
    /// The scenario that has begun on the lab and has not succeeded. See `kept.rs`.
    #[serde(default)]
    pub unfinished: Option<String>,
}

impl State {
    /// Reads a lab's state; none when there is no such lab.
    pub fn load(paths: &LabPaths) -> Result<Option<Self>> {
        let file = paths.state_file();
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("read {}", file.display())),
        };
        let state: Self =
            serde_json::from_str(&text).with_context(|| format!("parse {}", file.display()))?;
        ensure!(
            state.version == STATE_VERSION,
            "{}: version {}, this lab writes {STATE_VERSION}",
            file.display(),
            state.version
        );
        Ok(Some(state))
    }

    /// Replaces the state file atomically.
    pub fn save(&self, paths: &LabPaths) -> Result<()> {
        let (file, new) = (paths.state_file(), paths.dir().join("state.json.new"));
        let text = serde_json::to_vec_pretty(self).context("serialize the state")?;
        let mut out = File::create(&new).with_context(|| format!("create {}", new.display()))?;
        out.write_all(&text)
            .and_then(|()| out.sync_all())
            .context("write the state")?;
        fs::rename(&new, &file).with_context(|| format!("replace {}", file.display()))
    }

    /// The record of a node.
    pub fn node(&self, index: NodeIndex) -> Option<&NodeRecord> {
        self.nodes.iter().find(|node| node.index == index)
    }
}

/// Identity of this boot of the host.
pub fn boot_id() -> Result<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("read the boot id")?;
    Ok(id.trim().to_owned())
}

/// Where a lab keeps its files.
#[derive(Debug, Clone)]
pub struct LabPaths {
    root: PathBuf,
    name: LabName,
}

impl LabPaths {
    /// Below `$XDG_STATE_HOME/bascule`, or `~/.local/state/bascule`.
    pub fn new(name: &LabName) -> Result<Self> {
        Ok(Self {
            root: xdg_dir("XDG_STATE_HOME", ".local/state")?,
            name: name.clone(),
        })
    }

    /// Everything of this lab but its logs and its lock.
    pub fn dir(&self) -> PathBuf {
        self.root.join("labs").join(self.name.as_str())
    }

    /// `state.json`: what the lab consists of, read by every later command.
    pub fn state_file(&self) -> PathBuf {
        self.dir().join("state.json")
    }

    /// Keys, certificates and kubeconfigs.
    pub fn pki(&self) -> PathBuf {
        self.dir().join("pki")
    }

    /// Files of one node.
    pub fn node(&self, node: &str) -> PathBuf {
        self.dir().join("nodes").join(node)
    }

    /// Shared disks and the overlays of the machines' own disks.
    pub fn disks(&self) -> PathBuf {
        self.dir().join("disks")
    }

    /// The disk that all nodes share, as a file of the host.
    pub fn shared_disk(&self) -> PathBuf {
        self.disks().join(format!("{SHARED_DISK}.img"))
    }

    /// Document root of the lab's web server.
    pub fn web(&self) -> PathBuf {
        self.dir().join("web")
    }

    /// Logs of all runs of this lab.
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs").join(self.name.as_str())
    }

    /// Keeps other processes from bringing this lab up or down at the same time, until dropped.
    pub fn lock(&self) -> Result<File> {
        let file = self.lock_file("lock")?;
        let what = format!("another process to leave the lab {} alone", self.name);
        // A guard that takes down a killed run's lab needs seconds; an `up` in progress takes longer and is an error.
        wait_for(&what, LOCK_DEADLINE, || {
            flock(&file, FlockOperation::NonBlockingLockExclusive)
                .context("it is being brought up or down")
        })?;
        Ok(file)
    }

    /// Waits until no other test has a lab of this name, and keeps others waiting until dropped.
    pub(crate) fn lock_session(&self) -> Result<File> {
        let file = self.lock_file("session")?;
        flock(&file, FlockOperation::LockExclusive).context("wait for another test's lab")?;
        Ok(file)
    }

    fn lock_file(&self, kind: &str) -> Result<File> {
        let dir = self.root.join("labs");
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        let path = dir.join(format!("{}.{kind}", self.name));
        File::create(&path).with_context(|| format!("create {}", path.display()))
    }

    /// Keeps other processes from changing the state file, until dropped.
    pub(crate) fn lock_state(&self) -> Result<File> {
        let path = self.dir().join("state.lock");
        let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        flock(&file, FlockOperation::LockExclusive).context("wait for the state file")?;
        Ok(file)
    }

    /// Names of all labs with a directory.
    pub fn all_labs() -> Result<Vec<LabName>> {
        let dir = xdg_dir("XDG_STATE_HOME", ".local/state")?.join("labs");
        let Ok(entries) = fs::read_dir(&dir) else {
            return Ok(Vec::new());
        };
        let mut names: Vec<LabName> = entries
            .filter_map(Result::ok)
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
            .collect();
        names.sort();
        Ok(names)
    }
}

/// Longer than taking a lab down ever takes.
const LOCK_DEADLINE: Duration = Duration::from_secs(60);
/// Version of the state file: raised when its meaning changes.
pub(crate) const STATE_VERSION: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(name: &LabName) -> State {
        State {
            version: STATE_VERSION,
            name: name.clone(),
            tier: Tier::Native,
            families: Tier::Native.families(),
            boot_id: boot_id().unwrap(),
            logs: "/logs".into(),
            nodes: vec![NodeRecord {
                index: NodeIndex::new(1).unwrap(),
                machine: None,
            }],
            complete: false,
            ephemeral: true,
            contents: Vec::new(),
            unfinished: None,
        }
    }

    #[test]
    fn the_state_survives_a_round_trip_and_leaves_no_second_file() {
        let root = tempfile::tempdir().unwrap();
        let name: LabName = "unit".parse().unwrap();
        let paths = LabPaths {
            root: root.path().to_owned(),
            name: name.clone(),
        };
        assert_eq!(State::load(&paths).unwrap(), None);
        fs::create_dir_all(paths.dir()).unwrap();
        let state = sample(&name);
        state.save(&paths).unwrap();
        assert_eq!(State::load(&paths).unwrap(), Some(state));
        assert_eq!(fs::read_dir(paths.dir()).unwrap().count(), 1);
    }

    #[test]
    fn a_state_of_another_version_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let name: LabName = "unit".parse().unwrap();
        let paths = LabPaths {
            root: root.path().to_owned(),
            name: name.clone(),
        };
        fs::create_dir_all(paths.dir()).unwrap();
        State {
            version: STATE_VERSION + 1,
            ..sample(&name)
        }
        .save(&paths)
        .unwrap();
        assert!(
            State::load(&paths)
                .unwrap_err()
                .to_string()
                .contains("version")
        );
    }

    #[test]
    fn the_lock_of_a_lab_waits_for_its_holder() {
        let root = tempfile::tempdir().unwrap();
        let paths = LabPaths {
            root: root.path().to_owned(),
            name: "unit".parse().unwrap(),
        };
        let held = paths.lock().unwrap();
        let other = paths.clone();
        let waiter = std::thread::Builder::new()
            .name("waiter".into())
            .spawn(move || other.lock().unwrap());
        let waiter = waiter.unwrap();
        assert!(!waiter.is_finished());
        drop(held);
        waiter.join().unwrap();
    }
}
