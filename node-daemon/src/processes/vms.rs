//! Commands on VM processes: start, call, and remove them. `vm_start.rs` has the steps of a start.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use bascule_ipc::vm::{
    Home, LastState, Request, Response, StartMode, StopReason, VmConfig, VmState, VmStatus,
};
use bascule_ipc::{IpcError, Kind};
use bascule_node_api::command::{Outcome, RejectReason, VmSpec};
use bascule_types::{AttemptId, Epoch, Ownership, VmUid};

use super::calls::{console_call, vm_call};
use super::cgroups::VMS;
use super::supervisor::{Rejection, Supervisor, is_alive};
use super::tap;
use crate::files::names_in;
use crate::wait::wait_for;

/// The VM process and run directory of a VM on this node.
#[derive(Debug)]
pub(crate) enum Presence {
    /// No run directory.
    Absent,
    /// A process that responds.
    Responding(Box<VmStatus>),
    /// A process that exists and does not respond: it hangs or is starting. Contains its process id.
    Unresponsive(u32),
    /// The run directory of a process that has ended, and the last state that it wrote there.
    Ended(Option<VmState>),
}

impl Supervisor {
    /// The presence of a VM, by a call to its process.
    pub(crate) fn presence(&self, vm: VmUid) -> Presence {
        let folder = self.paths.vm(vm);
        if !folder.exists() {
            return Presence::Absent;
        }
        if let Ok(Response::Status(status)) = vm_call(&self.paths.vm_socket(vm), &Request::Status) {
            return Presence::Responding(status);
        }
        self.presence_without_call(vm)
    }

    /// The presence of a VM from files and `/proc` only, for a process that does not respond.
    pub(crate) fn presence_without_call(&self, vm: VmUid) -> Presence {
        let folder = self.paths.vm(vm);
        match (recorded_pid(&folder), last_state(&folder)) {
            (Some(pid), _) if is_alive(pid) => Presence::Unresponsive(pid),
            // Another command has removed the folder meanwhile.
            (None, None) if !folder.exists() => Presence::Absent,
            (_, last) => Presence::Ended(last),
        }
    }

    /// The status of a VM process, if it responds.
    pub(crate) fn vm_status(&self, vm: VmUid) -> Option<VmStatus> {
        match self.presence(vm) {
            Presence::Responding(status) => Some(*status),
            _ => None,
        }
    }

    /// The operation that a VM process waits for, for error messages; none when it waits for nothing
    /// or does not respond.
    pub(crate) fn vm_waits_for(&self, vm: VmUid) -> Option<String> {
        match vm_call(&self.paths.vm_socket(vm), &Request::WaitsFor) {
            Ok(Response::WaitsFor(what)) => what,
            _ => None,
        }
    }

    /// Whether a process of this VM exists here.
    pub(crate) fn vm_is_here(&self, vm: VmUid) -> bool {
        matches!(
            self.presence(vm),
            Presence::Responding(_) | Presence::Unresponsive(_)
        )
    }

    /// Why no VM can run on this node; none if one can.
    pub(crate) fn cannot_run(&self) -> Option<String> {
        let marker = self.paths.shutting_down();
        if marker.exists() {
            let marker = marker.display();
            return Some(format!("this node is shutting down ({marker} exists)"));
        }
        kvm_error()
    }

    /// Starts a VM that this node owns, booting or restoring it.
    pub(crate) fn start_vm(
        &self,
        spec: &VmSpec,
        ownership: Ownership,
        restore: bool,
    ) -> Result<Outcome, Rejection> {
        match self.presence(spec.uid) {
            Presence::Responding(status) if !is_over(&status.state) => {
                return if status.owner == Some(ownership.owner) && status.epoch == ownership.epoch {
                    Ok(Outcome::Done)
                } else {
                    Err(wrong_state(&format!(
                        "the VM runs here in epoch {} already",
                        status.epoch
                    )))
                };
            }
            Presence::Unresponsive(pid) => return Err(unresponsive(pid)),
            Presence::Responding(_) | Presence::Ended(_) => {
                let ended = last_ownership(&self.paths.vm(spec.uid));
                if !restore && ended.is_some_and(|ended| ended.epoch == ownership.epoch) {
                    return Err(wrong_state(&ended_here(ownership.epoch)));
                }
                self.collect(spec.uid)?;
            }
            Presence::Absent => {}
        }
        let start = if restore {
            StartMode::Restore
        } else {
            StartMode::Boot
        };
        self.launch_vm(spec, ownership, start)?;
        Ok(Outcome::Done)
    }

    /// Builds a VM that waits for its live migration.
    pub(crate) fn prepare_incoming(
        &self,
        spec: &VmSpec,
        attempt: AttemptId,
        ownership: Ownership,
    ) -> Result<Outcome, Rejection> {
        match self.presence(spec.uid) {
            Presence::Responding(status) if !is_over(&status.state) => {
                let start = self.start_mode(spec.uid);
                if !start.is_some_and(|start| awaits(&start, &status.state, attempt)) {
                    return Err(wrong_state("the VM is here already"));
                }
                // A repeated command: the operator's call may have timed out on a busy node.
                return listening(&self.await_start(spec.uid, status.pid)?);
            }
            Presence::Unresponsive(pid) => return Err(unresponsive(pid)),
            Presence::Responding(_) | Presence::Ended(_) => self.collect(spec.uid)?,
            Presence::Absent => {}
        }
        let listen = SocketAddr::new(self.address, 0);
        let start = StartMode::Incoming {
            listen,
            ports: Some(self.migration_ports),
            attempt,
        };
        let answer = self
            .launch_vm(spec, ownership, start)
            .and_then(|status| listening(&status));
        // The source keeps its guest: of a destination that could not be built nothing stays. It has
        // never been the VM's writer.
        if answer.is_err() {
            match self.presence(spec.uid) {
                Presence::Responding(status) if is_over(&status.state) => self.collect(spec.uid)?,
                Presence::Ended(_) => self.collect(spec.uid)?,
                // One that is slow is found by a repeated command.
                _ => {}
            }
        }
        answer
    }

    /// The configuration that a VM's process was started with.
    pub(super) fn start_mode(&self, vm: VmUid) -> Option<StartMode> {
        let bytes = fs::read(self.paths.vm(vm).join("config.json")).ok()?;
        let config: VmConfig = serde_json::from_slice(&bytes).ok()?;
        Some(config.start)
    }

    /// Passes a request to a running VM process.
    pub(crate) fn vm_request(&self, vm: VmUid, request: &Request) -> Result<Outcome, Rejection> {
        match vm_call(&self.paths.vm_socket(vm), request) {
            Ok(
                Response::Accepted
                | Response::Status(_)
                | Response::WaitsFor(_)
                | Response::Console { .. },
            ) => Ok(Outcome::Done),
            Ok(Response::Refused { reason }) => Err(wrong_state(&reason)),
            Err(error) => Err(self.unreachable(vm, &error)),
        }
    }

    /// Attaches to the serial console of a running guest. Returns the position of the stream's first byte.
    pub(crate) fn attach_console(
        &self,
        vm: VmUid,
        from: Option<u64>,
    ) -> Result<(u64, UnixStream), Rejection> {
        match console_call(&self.paths.vm_socket(vm), from) {
            Ok((Response::Console { position }, Some(fd))) => Ok((position, fd.into())),
            Ok((Response::Refused { reason }, _)) => Err(wrong_state(&reason)),
            Ok((other, _)) => Err(Rejection::new(
                RejectReason::Failed,
                format!("the VM process gives no console: {other:?}"),
            )),
            Err(IpcError::Version { .. }) => Err(wrong_state(
                "the VM's process is of a release without this console: move the VM first",
            )),
            Err(error) => Err(self.unreachable(vm, &error)),
        }
    }

    /// Ends a VM process whose run is over, and removes its run directory and taps.
    pub(crate) fn collect_vm(&self, vm: VmUid, pid: u32) -> Result<Outcome, Rejection> {
        match self.presence(vm) {
            Presence::Absent => Ok(Outcome::Done),
            Presence::Responding(status) if status.pid != pid => Ok(Outcome::Done),
            Presence::Responding(status)
                if is_over(&status.state) || status.state == VmState::Incoming =>
            {
                self.collect(vm)?;
                Ok(Outcome::Done)
            }
            Presence::Responding(status) => {
                Err(wrong_state(&format!("the VM is {:?} here", status.state)))
            }
            Presence::Unresponsive(pid) => Err(unresponsive(pid)),
            Presence::Ended(_) => {
                self.collect(vm)?;
                Ok(Outcome::Done)
            }
        }
    }

    fn collect(&self, vm: VmUid) -> Result<(), Rejection> {
        if let Presence::Responding(status) = self.presence(vm) {
            self.vm_request(vm, &Request::Exit)?;
            wait_for(EXIT_LIMIT, || (!is_alive(status.pid)).then_some(()))
                .ok_or_else(|| unresponsive(status.pid))?;
        }
        if let Err(error) = self.keep_console_log(vm) {
            tracing::warn!(%vm, error = format!("{error:#}"), "keep the console log");
        }
        self.remove_taps(vm)?;
        self.launcher.remove_cgroup(&cgroup_name(vm));
        let folder = self.paths.vm(vm);
        // Renamed first, which is atomic: in embedded mode two commands may remove the same VM
        // process, and neither may find a partly removed folder.
        let trash = self.paths.vms().join(format!("{vm}{TRASH_SUFFIX}"));
        let removed = remove_folder(&trash)
            .and_then(|()| unless_missing(fs::rename(&folder, &trash)))
            .and_then(|()| remove_folder(&trash));
        removed.with_context(|| format!("remove {}", folder.display()))?;
        Ok(())
    }

    /// Removes the VM's taps: those of its configuration, which a node had under an earlier UID too, and
    /// those that an interrupted start has left.
    fn remove_taps(&self, vm: VmUid) -> Result<()> {
        let config = fs::read(self.paths.vm(vm).join("config.json"));
        if let Some(config) = config
            .ok()
            .and_then(|bytes| serde_json::from_slice::<VmConfig>(&bytes).ok())
        {
            for interface in &config.interfaces {
                tap::remove(&interface.tap)?;
            }
        }
        tap::remove_all(self.identity.node, vm)
    }

    /// Removes what starts and removals have left that a crash interrupted. A VM that another command
    /// works on at this moment is left alone.
    pub(crate) fn remove_interrupted_starts(&self) -> Result<()> {
        for name in names_in(&self.paths.vms())? {
            let Ok(vm) = name.trim_end_matches(TRASH_SUFFIX).parse::<VmUid>() else {
                continue;
            };
            let Some(_lock) = self.try_vm_lock(vm)? else {
                continue;
            };
            let folder = self.paths.vms().join(&name);
            if name.ends_with(TRASH_SUFFIX) {
                remove_folder(&folder).with_context(|| format!("remove {name}"))?;
            } else if folder.exists() && recorded_pid(&folder).is_none() {
                tracing::info!(%vm, "removing a start that was interrupted");
                self.collect(vm).map_err(anyhow::Error::new)?;
            }
        }
        Ok(())
    }

    fn unreachable(&self, vm: VmUid, error: &IpcError) -> Rejection {
        match self.presence(vm) {
            Presence::Absent | Presence::Ended(_) => {
                Rejection::new(RejectReason::VmNotHere, "the VM does not run on this node")
            }
            Presence::Unresponsive(pid) => unresponsive(pid),
            Presence::Responding(status) if error.kind() == Kind::TimedOut => {
                unresponsive(status.pid)
            }
            Presence::Responding(_) => Rejection::new(RejectReason::Failed, error.to_string()),
        }
    }
}

pub(super) fn remove_folder(path: &Path) -> io::Result<()> {
    unless_missing(fs::remove_dir_all(path))
}

fn unless_missing(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The ownership of the process in `folder`: the one that it has written itself, or else the one that
/// it was started for.
pub(super) fn last_ownership(folder: &Path) -> Option<Ownership> {
    let read = |name: &str| fs::read(folder.join(name)).ok();
    let written = read("ownership.json").and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let started = || {
        let config: VmConfig = serde_json::from_slice(&read("config.json")?).ok()?;
        let Home { owner, epoch, .. } = config.home?;
        Some(Ownership { owner, epoch })
    };
    written.or_else(started)
}

/// The cgroup of a VM process.
pub(super) fn cgroup_name(vm: VmUid) -> String {
    format!("{VMS}/vm-{vm}")
}

/// The id of the process that was started for a run directory; none before it was.
pub(crate) fn recorded_pid(folder: &Path) -> Option<u32> {
    let text = fs::read_to_string(folder.join("pid")).ok()?;
    text.trim().parse().ok()
}

/// The last state that a process has written before it ended.
fn last_state(folder: &Path) -> Option<VmState> {
    let bytes = fs::read(folder.join("state.json")).ok()?;
    let last: LastState = serde_json::from_slice(&bytes).ok()?;
    Some(last.state)
}

/// Why no VM can run here; none when `/dev/kvm` works.
fn kvm_error() -> Option<String> {
    why_unusable(Path::new("/dev/kvm"))
}

fn why_unusable(kvm: &Path) -> Option<String> {
    let opened = fs::OpenOptions::new().read(true).write(true).open(kvm);
    let error = opened.err()?;
    let path = kvm.display();
    Some(format!(
        "{path}: {error}; enable virtualization on this node"
    ))
}

/// Whether a process with this start mode and state is the destination of `attempt`.
fn awaits(start: &StartMode, state: &VmState, attempt: AttemptId) -> bool {
    let of_attempt = matches!(start, StartMode::Incoming { attempt: of, .. } if *of == attempt);
    of_attempt && matches!(state, VmState::Starting | VmState::Incoming)
}

fn listening(status: &VmStatus) -> Result<Outcome, Rejection> {
    let address = status.listening.ok_or_else(|| {
        let why = match &status.state {
            VmState::Stopped(StopReason::Failed { what }) => what.clone(),
            other => format!("{other:?}"),
        };
        Rejection::new(
            RejectReason::Failed,
            format!("the VM process does not listen: {why}"),
        )
    })?;
    Ok(Outcome::Listening { address })
}

/// Whether a process never runs its guest again.
pub(crate) fn is_over(state: &VmState) -> bool {
    matches!(state, VmState::Stopped(_) | VmState::Departed)
}

/// Writes of that process may be under way: the guest starts again in a later epoch, which the volume begins
/// when they are complete.
fn ended_here(epoch: Epoch) -> String {
    format!("a process of the VM has ended here in epoch {epoch}: the VM must be released first")
}

fn wrong_state(message: &str) -> Rejection {
    Rejection::new(RejectReason::WrongState, message)
}

pub(super) fn unresponsive(pid: u32) -> Rejection {
    Rejection::new(
        RejectReason::ProcessUnresponsive,
        format!("the VM process {pid} exists and does not answer"),
    )
}

/// Of a run directory that is being removed.
const TRASH_SUFFIX: &str = ".gone";
/// A process without a guest ends within milliseconds.
const EXIT_LIMIT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use bascule_node_api::cloud_init::CloudInitSecrets;
    use bascule_types::{Generation, Owner, SlotId};

    use super::*;

    /// Found when three guests left an emulated node: the repeated command arrived while the machine
    /// was still being built, and was refused as if the VM ran there.
    #[test]
    fn a_destination_that_is_still_being_built_is_recognised_by_its_attempt() {
        let attempt = AttemptId::random();
        let listen = "127.0.0.1:0".parse().unwrap();
        let ports = None;
        let start = StartMode::Incoming {
            listen,
            ports,
            attempt,
        };
        for state in [VmState::Starting, VmState::Incoming] {
            assert!(awaits(&start, &state, attempt));
            assert!(!awaits(&start, &state, AttemptId::random()));
            assert!(!awaits(&StartMode::Boot, &state, attempt));
        }
        assert!(!awaits(&start, &VmState::Running, attempt));
    }

    #[test]
    fn i1_a_vm_whose_process_has_ended_is_not_booted_again_in_that_epoch() {
        let folder = tempfile::tempdir().unwrap();
        let node = Supervisor::test(folder.path());
        let spec = VmSpec {
            uid: VmUid::random(),
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            volume: "gold".to_owned(),
            cpus: 1,
            memory: bascule_types::Bytes::mib(64),
            kernel: Some("shop/kernel".to_owned()),
            initrd: None,
            cmdline: String::new(),
            disks: Vec::new(),
            interfaces: Vec::new(),
            shutdown_timeout_ms: None,
            cloud_init: None,
            guest_agent: false,
            on_panic: bascule_types::OnPanic::default(),
            cloud_init_secrets: CloudInitSecrets::default(),
        };
        let owner = Owner {
            slot: SlotId(1),
            generation: Generation(1),
        };
        let run_dir = node.paths.vm(spec.uid);
        let ended = Ownership::new(owner, Epoch(5));
        let leave = || {
            fs::create_dir_all(&run_dir).unwrap();
            let written = serde_json::to_vec(&ended).unwrap();
            fs::write(run_dir.join("ownership.json"), written).unwrap();
        };
        leave();
        let refused = node.start_vm(&spec, ended, false).unwrap_err();
        assert!(refused.message.contains("epoch 5"), "{refused}");
        assert!(run_dir.exists(), "it is not collected either");
        // One that was to restore the guest did not run it. There is no program here to start.
        for (epoch, restore) in [(Epoch(5), true), (Epoch(6), false)] {
            leave();
            let next = Ownership::new(owner, epoch);
            let refused = node.start_vm(&spec, next, restore).unwrap_err();
            assert!(!refused.message.contains("released first"), "{refused}");
        }
    }

    /// Otherwise the operator would start a guest again on the host that is going down.
    #[test]
    fn a_node_that_shuts_down_runs_no_guest_and_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let node = Supervisor::test(folder.path());
        let shutting_down = |node: &Supervisor| {
            let why = node.cannot_run().unwrap_or_default();
            why.contains("shutting down")
        };
        assert!(!shutting_down(&node));
        fs::write(node.paths.shutting_down(), "").unwrap();
        assert!(shutting_down(&node));
    }

    #[test]
    fn a_node_without_kvm_says_which_device_and_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let device = folder.path().join("kvm");
        let error = why_unusable(&device).unwrap();
        assert!(
            error.starts_with(&*device.to_string_lossy()) && error.contains("enable"),
            "{error}"
        );
        fs::write(&device, "").unwrap();
        assert_eq!(why_unusable(&device), None);
    }

    /// The file was parsed as a whole status, which failed, so every process that had ended by itself
    /// was reported without a last state.
    #[test]
    fn the_last_state_that_a_process_wrote_is_read() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(last_state(folder.path()), None);
        let what = "panicked".to_owned();
        let last = LastState {
            uid: VmUid::random(),
            state: VmState::Stopped(StopReason::Failed { what }),
        };
        let json = serde_json::to_vec(&last).unwrap();
        fs::write(folder.path().join("state.json"), json).unwrap();
        assert_eq!(last_state(folder.path()), Some(last.state));
    }
}
