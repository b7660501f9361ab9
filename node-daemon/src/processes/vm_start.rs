//! Starting a VM process: a sequence of steps, each with its undo, so that nothing of a failed start
//! stays on the node.
//!
//! | step | undo |
//! |---|---|
//! | the run directory, and with it the user | removed |
//! | one tap for each interface, with the filter of its source address, attached to its bridge | removed, and the filter with it |
//! | `config.json`, `spec.json` | removed with the run directory |
//! | the process, which makes its cgroup, socket, logs and state itself | none |
//!
//! From the last step on there may be a process that has become the VM's writer, so nothing is undone: its
//! run directory is the evidence that it was started in this epoch. When it ends, or never answers, the
//! reports say so, and [`Supervisor::collect_vm`] removes the same things once the epoch is over.
//!
//! The run directory is made first and removed last, and everything is named after the VM: what a daemon
//! leaves that ends in the middle is found by these names
//! ([`Supervisor::remove_interrupted_starts`]). The process writes its id to the run directory before it
//! executes `bascule-vm`, so that a directory without one is that of a start without a process.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use bascule_ipc::vm::{
    Boot, DiskConfig, DiskSource, Home, ImageSource, InterfaceConfig, ProcessUser, StartMode,
    VmConfig, VmState, VmStatus,
};
use bascule_node_api::command::{RejectReason, VmSpec};
use bascule_types::{Ownership, VmUid};

use super::cgroups::Share;
use super::launcher::FIRMWARE;
use super::supervisor::{Rejection, Supervisor, is_alive};
use super::tap;
use super::undo::Undo;
use super::vms::{Presence, cgroup_name, remove_folder, unresponsive};
use crate::files;
use crate::wait::wait_for;

/// A tap that the VM needs.
#[derive(Clone, Debug, PartialEq, Eq)]
struct WantedTap {
    tap: String,
    bridge: String,
    mac: [u8; 6],
}

/// What the steps do on the node. Undo steps succeed also where there is nothing to undo.
trait StartEffects {
    fn make_folder(&self) -> Result<()>;
    fn remove_folder(&self) -> Result<()>;
    /// Makes a tap on its bridge, and returns the bridge's MTU in bytes.
    fn make_tap(&self, tap: &WantedTap) -> Result<u16>;
    fn remove_tap(&self, tap: &WantedTap) -> Result<()>;
    fn write_documents(&self, interfaces: Vec<InterfaceConfig>) -> Result<()>;
    /// Starts the process and returns its id. There is no process after an error.
    fn spawn(&self) -> Result<u32>;
}

/// Executes the steps, and returns the process id; undoes them if one fails.
fn start(effects: &impl StartEffects, taps: &[WantedTap]) -> Result<u32, Rejection> {
    let mut undo = Undo::default();
    undo.before("remove the run directory", || effects.remove_folder());
    effects.make_folder()?;
    let mut interfaces = Vec::new();
    for (index, wanted) in taps.iter().enumerate() {
        undo.before(format!("remove tap {}", wanted.tap), || {
            effects.remove_tap(wanted)
        });
        let mtu = effects.make_tap(wanted).map_err(|error| {
            Rejection::new(
                RejectReason::BridgeUnavailable,
                format!(
                    "interfaces[{index}].bridge: bridge {}: {error:#}",
                    wanted.bridge
                ),
            )
        })?;
        interfaces.push(InterfaceConfig {
            tap: wanted.tap.clone(),
            mac: wanted.mac,
            mtu: Some(mtu),
            bridge: wanted.bridge.clone(),
        });
    }
    effects.write_documents(interfaces)?;
    let pid = effects.spawn()?;
    undo.keep();
    Ok(pid)
}

impl Supervisor {
    /// Starts a VM process and returns its first status.
    pub(super) fn launch_vm(
        &self,
        spec: &VmSpec,
        ownership: Ownership,
        mode: StartMode,
    ) -> Result<VmStatus, Rejection> {
        if let Some(message) = self.cannot_run() {
            return Err(Rejection::new(RejectReason::KvmUnavailable, message));
        }
        let taps = self.wanted_taps(spec)?;
        let on_node = OnNode {
            node: self,
            spec,
            ownership,
            mode,
        };
        let pid = start(&on_node, &taps)?;
        if !matches!(on_node.mode, StartMode::Boot) {
            self.forget_console_log(spec.uid);
        }
        self.await_start(spec.uid, pid)
    }

    /// The spec that a VM was started with, as this node wrote it down.
    pub(crate) fn spec_of(&self, vm: VmUid) -> Result<VmSpec, Rejection> {
        let path = self.paths.vm(vm).join(SPEC_FILE);
        let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let spec =
            serde_json::from_slice(&bytes).with_context(|| format!("parse {}", path.display()))?;
        Ok(spec)
    }

    fn wanted_taps(&self, spec: &VmSpec) -> Result<Vec<WantedTap>, Rejection> {
        let wanted = spec
            .interfaces
            .iter()
            .enumerate()
            .map(|(index, interface)| {
                let bridge = self.bridges.get(&interface.network).ok_or_else(|| {
                    Rejection::new(
                        RejectReason::BridgeUnavailable,
                        format!(
                            "interfaces[{index}].bridge: no bridge {:?} is allowed on this node",
                            interface.network
                        ),
                    )
                })?;
                Ok(WantedTap {
                    tap: tap::name(self.identity.node, spec.uid, index),
                    bridge: bridge.clone(),
                    mac: interface.mac,
                })
            });
        wanted.collect()
    }

    /// Waits until a started process responds, and until an incoming one listens.
    pub(super) fn await_start(&self, vm: VmUid, pid: u32) -> Result<VmStatus, Rejection> {
        let answer = wait_for(START_LIMIT, || match self.presence(vm) {
            Presence::Responding(status) if is_coming_up(&status) => None,
            Presence::Responding(status) => Some(Ok(*status)),
            Presence::Unresponsive(_) => None,
            Presence::Absent | Presence::Ended(_) => {
                self.reap();
                (!is_alive(pid)).then(|| Err(self.log_tail(vm)))
            }
        });
        answer.unwrap_or_else(|| Err(unresponsive(pid)))
    }

    /// The error for a process that ended at startup, with the end of its log.
    fn log_tail(&self, vm: VmUid) -> Rejection {
        let log = fs::read_to_string(self.paths.vm(vm).join("vm.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(LOG_TAIL_LINES).collect();
        let words: Vec<&str> = lines.into_iter().rev().collect();
        Rejection::new(
            RejectReason::Failed,
            format!("the VM process ended at startup: {}", words.join(" | ")),
        )
    }
}

/// [`StartEffects`] on the real node.
struct OnNode<'a> {
    node: &'a Supervisor,
    spec: &'a VmSpec,
    ownership: Ownership,
    mode: StartMode,
}

impl OnNode<'_> {
    fn folder(&self) -> PathBuf {
        self.node.paths.vm(self.spec.uid)
    }

    fn config(&self, interfaces: Vec<InterfaceConfig>, user: Option<ProcessUser>) -> VmConfig {
        let spec = self.spec;
        let disks = spec.disks.iter().map(|disk| DiskConfig {
            name: disk.name.clone(),
            source: DiskSource::Volume {
                disk: disk.row.clone(),
                read_only: disk.read_only,
            },
            on_error: disk.on_error,
        });
        VmConfig {
            version: VmConfig::VERSION,
            uid: spec.uid,
            name: format!("{}/{}", spec.namespace, spec.name),
            cpus: spec.cpus,
            memory: spec.memory,
            boot: Boot {
                kernel: match &spec.kernel {
                    Some(kernel) => image(kernel),
                    None => ImageSource::Firmware {
                        path: self.node.launcher.programs.join(FIRMWARE),
                    },
                },
                initrd: spec.initrd.as_deref().map(image),
                cmdline: spec.cmdline.clone(),
            },
            disks: disks.collect(),
            interfaces,
            home: Some(Home {
                socket: self.node.paths.volume_socket(&spec.volume),
                owner: self.ownership.owner,
                epoch: self.ownership.epoch,
            }),
            start: self.mode.clone(),
            tls_dir: Some(self.node.paths.tls()),
            shutdown_timeout_ms: spec.shutdown_timeout_ms,
            cloud_init: spec.cloud_init.clone(),
            user,
            guest_agent: spec.guest_agent,
            on_panic: spec.on_panic,
        }
    }
}

impl StartEffects for OnNode<'_> {
    fn make_folder(&self) -> Result<()> {
        self.node.make_vm_folder(self.spec.uid)
    }

    fn remove_folder(&self) -> Result<()> {
        let folder = self.folder();
        remove_folder(&folder).with_context(|| format!("remove {}", folder.display()))
    }

    fn make_tap(&self, tap: &WantedTap) -> Result<u16> {
        tap::ensure(&tap.tap, &tap.bridge, tap.mac)
    }

    fn remove_tap(&self, tap: &WantedTap) -> Result<()> {
        tap::remove(&tap.tap)
    }

    fn write_documents(&self, interfaces: Vec<InterfaceConfig>) -> Result<()> {
        let folder = self.folder();
        let user = self.node.user_of(self.spec.uid, &self.spec.volume)?;
        let config = self.config(interfaces, user);
        let json = serde_json::to_vec_pretty(&config).context("write config.json")?;
        files::replace(&folder.join("config.json"), &json, 0o600)?;
        let json = serde_json::to_vec_pretty(self.spec).context("write spec.json")?;
        files::replace(&folder.join(SPEC_FILE), &json, 0o600)
    }

    fn spawn(&self) -> Result<u32> {
        let folder = self.folder();
        let args: Vec<OsString> = vec!["--config".into(), folder.join("config.json").into()];
        let share = Share::of_guest(self.spec.cpus, self.spec.memory);
        let child = self.node.launcher.spawn_recorded(
            "bascule-vm",
            (&cgroup_name(self.spec.uid), share),
            &folder.join("vm.log"),
            &folder.join("pid"),
            &args,
        )?;
        let pid = child.id();
        self.node.adopt_child(child);
        // As the process does itself, a moment later: until then a report would call it ended.
        let noted = files::replace(&folder.join("pid"), pid.to_string().as_bytes(), 0o644);
        if let Err(error) = noted {
            tracing::warn!(vm = %self.spec.uid, error = format!("{error:#}"), "note the process id");
        }
        tracing::info!(
            vm = %self.spec.uid,
            name = format!("{}/{}", self.spec.namespace, self.spec.name),
            epoch = %self.ownership.epoch,
            pid,
            "VM process started"
        );
        Ok(pid)
    }
}

/// Whether a process has yet to boot or to listen.
fn is_coming_up(status: &VmStatus) -> bool {
    match status.state {
        VmState::Starting => true,
        VmState::Incoming => status.listening.is_none(),
        _ => false,
    }
}

fn image(row: &str) -> ImageSource {
    ImageSource::Volume {
        disk: row.to_owned(),
    }
}

/// The spec of a VM in its run directory, for whoever asks what it was started with.
const SPEC_FILE: &str = "spec.json";
/// A VM process maps its memory and opens its disks in well under a second; an emulated node takes
/// several. The memory of a migration's destination becomes resident later, while the source copies.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How many log lines of an ended process an error message repeats.
const LOG_TAIL_LINES: usize = 3;

#[cfg(test)]
mod tests;
