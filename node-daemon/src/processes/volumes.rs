//! Commands about volume processes.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bascule_ipc::volume::{FencingMode, Request, Response, VolumeStatus};
use bascule_ipc::{Kind, watchdog};
use bascule_node_api::VOLUME_PORTS;
use bascule_node_api::command::{Backing, FormatOptions, Outcome, RejectReason};
use bascule_types::{Change, ClusterId, NodeUid, VolumeId};

use super::calls::volume_call;
use super::cgroups::{CRITICAL, Share};
use super::supervisor::{Rejection, Supervisor, is_alive};
use crate::files::{self, names_in};
use crate::wait::wait_for;

impl Supervisor {
    /// Formats a blank device; this node gets the first slot.
    pub(crate) fn format_volume(
        &self,
        backing: &Backing,
        cluster: ClusterId,
        options: &FormatOptions,
    ) -> Result<Outcome, Rejection> {
        let mut command = Command::new(self.launcher.programs.join("bascule-volume"));
        command.arg("format").arg(backing_path(backing)).args([
            "--cluster",
            &cluster.to_string(),
            "--node-uid",
            &self.identity.node.to_string(),
            "--json",
        ]);
        command.args(format_flags(options));
        if let Backing::File {
            size: Some(size), ..
        } = backing
        {
            command.args(["--create-size", &size.0.to_string()]);
        }
        let output = command.output().context("run bascule-volume format")?;
        if output.status.success() {
            let made: Formatted =
                serde_json::from_slice(&output.stdout).context("read what format answered")?;
            tracing::info!(volume = %made.volume, path = %backing_path(backing).display(), "formatted");
            return Ok(Outcome::Formatted {
                volume: made.volume,
            });
        }
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(Rejection::new(reject_reason(output.status.code()), message))
    }

    /// Starts a volume's process, if it does not run.
    pub(crate) fn attach_volume(
        &self,
        name: &str,
        backing: &Backing,
        volume: Option<VolumeId>,
        cluster: ClusterId,
    ) -> Result<Outcome, Rejection> {
        check_name(name)?;
        let _lock = self.lock_volumes()?;
        let folder = self.paths.volume(name);
        if self.volume_is_up(name) {
            return Ok(Outcome::Done);
        }
        self.ensure_watchdog()?;
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let attachment = Attachment {
            backing: backing.clone(),
            volume,
            cluster,
            node: Some(self.uid_on(name)),
        };
        let json = serde_json::to_vec_pretty(&attachment).context("write attachment.json")?;
        files::replace(&folder.join("attachment.json"), &json, 0o600)?;
        self.launch_volume(name, &attachment)?;
        Ok(Outcome::Done)
    }

    /// Restarts the processes of attached volumes that have ended, for example by a crash. A failure
    /// to start one does not delay the others.
    pub(crate) fn restart_ended_volumes(&self) -> Result<()> {
        let _lock = self.lock_volumes()?;
        let mut restart_backoff =
            (self.restart_backoff.lock()).unwrap_or_else(PoisonError::into_inner);
        for name in self.volume_names()? {
            if self.volume_is_up(&name) {
                continue;
            }
            let path = self.paths.volume(&name).join("attachment.json");
            let Ok(bytes) = fs::read(&path) else { continue };
            if !restart_backoff.is_due(&name, Instant::now()) {
                continue;
            }
            tracing::warn!(volume = %name, "the volume process has ended; restarting it");
            if let Err(error) = self.restart_volume(&name, &bytes) {
                tracing::error!(volume = %name, error = format!("{error:#}"), "cannot restart the volume process");
            }
        }
        Ok(())
    }

    /// Starts the watchdog's process again if it has ended while a volume is attached: its device goes
    /// on counting. Does not wait until it answers.
    pub(crate) fn restart_ended_watchdog(&self) -> Result<()> {
        let _alone = self.lock_volumes()?;
        let attached = |name: &String| self.paths.volume(name).join("attachment.json").exists();
        let socket = self.paths.watchdog_socket();
        if !self.volume_names()?.iter().any(attached) || !watchdog_has_ended(&socket) {
            return Ok(());
        }
        let mut backoff = (self.watchdog_backoff.lock()).unwrap_or_else(PoisonError::into_inner);
        if backoff.is_due(WATCHDOG, Instant::now()) {
            tracing::warn!("bascule-watchdog has ended; starting it again");
            self.launch_watchdog()?;
        }
        Ok(())
    }

    fn restart_volume(&self, name: &str, attachment: &[u8]) -> Result<()> {
        let attachment = serde_json::from_slice(attachment).context("read attachment.json")?;
        self.ensure_watchdog()?;
        self.launch_volume(name, &attachment)?;
        Ok(())
    }

    /// Ends a volume's process. Rejected while a VM of this node has the volume open.
    pub(crate) fn detach_volume(&self, name: &str) -> Result<Outcome, Rejection> {
        check_name(name)?;
        let _lock = self.lock_volumes()?;
        let folder = self.paths.volume(name);
        if !folder.exists() {
            return Ok(Outcome::Done);
        }
        if self.open_here(name)? {
            return Err(Rejection::new(
                RejectReason::WrongState,
                format!("volume {name}: VMs of this node still have it open"),
            ));
        }
        if let Some(pid) = self.volume_pid(name).filter(|pid| is_alive(*pid)) {
            let raw = i32::try_from(pid).context("process id")?;
            let target = rustix::process::Pid::from_raw(raw).context("process id")?;
            rustix::process::kill_process(target, rustix::process::Signal::TERM)
                .context("end the volume's process")?;
            wait_for(DETACH_LIMIT, || (!is_alive(pid)).then_some(())).ok_or_else(|| {
                Rejection::new(
                    RejectReason::ProcessUnresponsive,
                    format!("volume {name}: process {pid} does not end"),
                )
            })?;
        }
        self.launcher.remove_cgroup(&cgroup_name(name));
        fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
        Ok(Outcome::Done)
    }

    /// Sends a request for a metadata change, or for all rows, to the volume's process.
    pub(crate) fn volume_request(
        &self,
        name: &str,
        request: &Request,
    ) -> Result<Outcome, Rejection> {
        check_name(name)?;
        match volume_call(&self.paths.volume_socket(name), request) {
            Ok(Response::Granted(answer)) => Ok(Outcome::Granted(answer)),
            Ok(Response::Refused(refusal)) => Ok(Outcome::Refused(refusal)),
            Ok(Response::Unknown) => Ok(Outcome::Unknown),
            Ok(Response::Rows(rows)) => Ok(Outcome::Rows(rows)),
            Ok(Response::Unavailable { reason }) => {
                Err(Rejection::new(RejectReason::DeviceUnavailable, reason))
            }
            Ok(other) => Err(Rejection::new(
                RejectReason::Failed,
                format!("answered {other:?}"),
            )),
            // The change may have been granted before the time limit passed.
            Err(error) if error.kind() == Kind::TimedOut => Ok(Outcome::Unknown),
            Err(error) => Err(Rejection::new(
                RejectReason::VolumeNotAttached,
                format!("volume {name} is not attached on this node: {error}"),
            )),
        }
    }

    /// A volume's state, as its process on this node reports it.
    pub(crate) fn volume_status(&self, name: &str) -> Result<VolumeStatus, String> {
        match volume_call(&self.paths.volume_socket(name), &Request::Status) {
            Ok(Response::Status(status)) => Ok(status),
            Ok(Response::Unavailable { reason }) => Err(reason),
            Ok(other) => Err(format!("answered {other:?}")),
            Err(error) => Err(format!("{error}; {}", self.volume_log_tail(name))),
        }
    }

    pub(crate) fn change(&self, volume: &str, change: Change) -> Result<Outcome, Rejection> {
        self.volume_request(volume, &Request::Change(change))
    }

    /// The UID under which this node has its slot on an attached volume. It stays what it was when the
    /// volume was first attached in this boot, also after the Node object was registered anew: the
    /// slot's lease, and the VMs that rely on it, are of processes of this boot.
    pub(crate) fn uid_on(&self, volume: &str) -> NodeUid {
        let path = self.paths.volume(volume).join("attachment.json");
        let attached = fs::read(path).ok();
        let attached: Option<Attachment> =
            attached.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        attached.map_or(self.identity.node, |attached| {
            attached.holder(self.identity.node)
        })
    }

    pub(crate) fn volume_names(&self) -> Result<Vec<String>> {
        names_in(&self.paths.volumes())
    }

    fn launch_volume(&self, name: &str, attachment: &Attachment) -> Result<(), Rejection> {
        let folder = self.paths.volume(name);
        let listen = free_address(self.address)?;
        let mut args: Vec<OsString> = vec!["serve".into()];
        match &attachment.backing {
            Backing::Device { path } => args.extend(["--device".into(), path.into()]),
            Backing::File { path, .. } => args.extend(["--file".into(), path.into()]),
        }
        if let Some(volume) = attachment.volume {
            args.extend(["--volume".into(), volume.to_string().into()]);
        }
        args.extend([
            "--cluster".into(),
            attachment.cluster.to_string().into(),
            "--node-uid".into(),
            attachment.holder(self.identity.node).to_string().into(),
            "--run-dir".into(),
            folder.clone().into(),
            "--ledger-dir".into(),
            self.paths.metadata_writes().into(),
            "--tls-dir".into(),
            self.paths.tls().into(),
            "--listen".into(),
            listen.to_string().into(),
            "--watchdog-socket".into(),
            self.paths.watchdog_socket().into(),
        ]);
        if let Some(users) = self.users {
            let group = users.shared_group().to_string();
            args.extend(["--socket-group".into(), group.into()]);
            // Whatever this process's umask made of it: the socket is in it.
            fs::set_permissions(&folder, Permissions::from_mode(0o755))
                .with_context(|| format!("share {}", folder.display()))?;
        }
        args.extend(["--vms-dir".into(), self.paths.vms().into()]);
        let log = folder.join("volume.log");
        let cgroup = cgroup_name(name);
        let place = (cgroup.as_str(), Share::of_critical());
        let child = self.launcher.spawn("bascule-volume", place, &log, &args)?;
        let pid = child.id();
        self.adopt_child(child);
        files::replace(&folder.join("pid"), pid.to_string().as_bytes(), 0o644)?;
        tracing::info!(volume = %name, pid, "volume process started");
        Ok(())
    }

    /// Starts the watchdog's process, if it does not run.
    fn ensure_watchdog(&self) -> Result<(), Rejection> {
        let socket = self.paths.watchdog_socket();
        if watchdog_answers(&socket) {
            return Ok(());
        }
        self.launch_watchdog()?;
        wait_for(WATCHDOG_LIMIT, || watchdog_answers(&socket).then_some(())).ok_or_else(|| {
            let log = self.watchdog_log();
            Rejection::new(
                RejectReason::Failed,
                format!("bascule-watchdog does not answer; see {}", log.display()),
            )
        })
    }

    fn launch_watchdog(&self) -> Result<()> {
        let mut args: Vec<OsString> = vec!["--run-dir".into(), self.paths.run().into()];
        match &self.watchdog {
            Some(device) => args.extend(["--device".into(), device.into()]),
            None => args.push("--none".into()),
        }
        if self.allow_softdog {
            args.push("--allow-softdog".into());
        }
        let log = self.watchdog_log();
        let cgroup = format!("{CRITICAL}/watchdog");
        let place = (cgroup.as_str(), Share::of_critical());
        let child = self.launcher.spawn(WATCHDOG, place, &log, &args)?;
        self.adopt_child(child);
        Ok(())
    }

    fn watchdog_log(&self) -> PathBuf {
        self.paths.logs().join("watchdog.log")
    }

    fn volume_is_up(&self, name: &str) -> bool {
        self.volume_pid(name).is_some_and(is_alive)
    }

    fn volume_pid(&self, name: &str) -> Option<u32> {
        fs::read_to_string(self.paths.volume(name).join("pid"))
            .ok()?
            .trim()
            .parse()
            .ok()
    }

    fn volume_log_tail(&self, name: &str) -> String {
        let log =
            fs::read_to_string(self.paths.volume(name).join("volume.log")).unwrap_or_default();
        log.lines().last().unwrap_or("its log is empty").to_owned()
    }

    fn open_here(&self, name: &str) -> Result<bool> {
        Ok(self
            .vm_reports()?
            .iter()
            .any(|report| report.volume == name && report.alive))
    }
}

/// The cgroup of a volume process.
fn cgroup_name(volume: &str) -> String {
    format!("{CRITICAL}/volume-{volume}")
}

/// `attachment.json` of a volume's run directory: the parameters to restart its process with.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Attachment {
    backing: Backing,
    volume: Option<VolumeId>,
    cluster: ClusterId,
    /// The UID that this node had when the volume was attached in this boot: its slot's.
    #[serde(default)]
    node: Option<NodeUid>,
}

impl Attachment {
    /// The UID to serve the volume under.
    fn holder(&self, node: NodeUid) -> NodeUid {
        self.node.unwrap_or(node)
    }
}

/// What `bascule-volume format --json` prints.
#[derive(Debug, serde::Deserialize)]
struct Formatted {
    volume: VolumeId,
}

/// The path of the device or file.
pub(crate) fn backing_path(backing: &Backing) -> &Path {
    match backing {
        Backing::Device { path } | Backing::File { path, .. } => path,
    }
}

/// `bascule-volume format`'s flags for these options.
pub(crate) fn format_flags(options: &FormatOptions) -> Vec<String> {
    let fencing = match options.fencing {
        FencingMode::Watchdog => "watchdog",
        FencingMode::LeaseOnly => "lease-only",
    };
    let mut flags = vec!["--fencing".to_owned(), fencing.to_owned()];
    let numbers = [
        ("--lease-ms", options.lease_ms),
        ("--watch-ms", options.watch_ms),
        ("--watchdog-ms", options.watchdog_ms),
        ("--settle-ms", options.settle_ms),
        ("--extent-bytes", options.extent.map(|bytes| bytes.0)),
    ];
    if options.allow_software_watchdog {
        flags.push("--allow-software-watchdog".to_owned());
    }
    if options.allow_out_of_service_taint {
        flags.push("--allow-out-of-service-taint".to_owned());
    }
    for (flag, value) in numbers {
        if let Some(value) = value {
            flags.extend([flag.to_owned(), value.to_string()]);
        }
    }
    flags
}

/// A volume's name becomes the name of a folder: it is a Kubernetes name (RFC 1123), nothing else.
fn check_name(name: &str) -> Result<(), Rejection> {
    let fits = !name.is_empty() && name.len() <= 253 && !name.starts_with(['.', '-']);
    let spelled = name
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.');
    if fits && spelled {
        Ok(())
    } else {
        Err(Rejection::new(
            RejectReason::Failed,
            format!("{name:?} is not the name of a volume"),
        ))
    }
}

/// A free port for a volume's process on this node's address.
fn free_address(ip: IpAddr) -> Result<SocketAddr, Rejection> {
    VOLUME_PORTS
        .ports()
        .map(|port| SocketAddr::new(ip, port))
        .find(|candidate| TcpListener::bind(candidate).is_ok())
        .ok_or_else(|| {
            Rejection::new(
                RejectReason::Failed,
                format!(
                    "none of the TCP ports {VOLUME_PORTS} is free on {ip}: a node attaches at most \
                     that many volumes"
                ),
            )
        })
}

/// Whether no process listens on the socket. A process that is frozen still does: a second one would find
/// its lock taken.
fn watchdog_has_ended(socket: &Path) -> bool {
    UnixStream::connect(socket).is_err_and(|error| {
        matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
        )
    })
}

fn watchdog_answers(socket: &Path) -> bool {
    let Ok(mut connection) = bascule_ipc::Connection::connect(socket, WATCHDOG_HELLO) else {
        return false;
    };
    connection
        .call::<_, watchdog::Response>(&watchdog::Request::Status)
        .is_ok()
}

fn reject_reason(code: Option<i32>) -> RejectReason {
    match code {
        Some(EXIT_NOT_BLANK) => RejectReason::NotBlank,
        Some(EXIT_TOO_SMALL) => RejectReason::TooSmall,
        Some(EXIT_UNAVAILABLE) => RejectReason::DeviceUnavailable,
        _ => RejectReason::Failed,
    }
}

/// `bascule-volume`'s exit codes, as its `--help` says.
const EXIT_UNAVAILABLE: i32 = 3;
const EXIT_NOT_BLANK: i32 = 4;
const EXIT_TOO_SMALL: i32 = 5;
/// A volume process without an open writer ends after its current lease renewal.
const DETACH_LIMIT: Duration = Duration::from_secs(20);
/// The program of the watchdog's process.
const WATCHDOG: &str = "bascule-watchdog";
/// `bascule-watchdog` opens one device at its start.
const WATCHDOG_LIMIT: Duration = Duration::from_secs(10);
const WATCHDOG_HELLO: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Identity;

    #[test]
    fn a_volume_name_that_is_not_an_rfc_1123_name_is_rejected() {
        assert!(check_name("gold.fast-1").is_ok());
        for bad in ["", "..", "a/b", "-x", "Gold"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    fn attachment(node: Option<NodeUid>) -> Attachment {
        Attachment {
            backing: Backing::Device {
                path: "/dev/null".into(),
            },
            volume: None,
            cluster: ClusterId::random(),
            node,
        }
    }

    /// The lease of the slot and the VMs that rely on it are of processes of this boot. Under the new
    /// UID a volume process that ended would leave them without a lease.
    #[test]
    fn a_volume_stays_attached_under_the_uid_of_its_slot_when_its_node_is_registered_anew() {
        let folder = tempfile::tempdir().unwrap();
        let node = Supervisor::test(folder.path());
        let old = node.identity.node;
        assert_eq!(node.uid_on("gold"), old, "not attached yet");
        let write = |attachment: &Attachment| {
            let path = node.paths.volume("gold").join("attachment.json");
            let json = serde_json::to_vec(attachment).unwrap();
            files::replace(&path, &json, 0o600).unwrap();
        };
        write(&attachment(Some(node.uid_on("gold"))));
        let identity = Identity {
            node: NodeUid::random(),
            ..node.identity.clone()
        };
        let anew = node.under(identity.clone());
        assert_eq!(anew.uid_on("gold"), old);
        assert_eq!(anew.uid_on("silver"), identity.node, "attached from now on");
        // After a boot the run directory is empty.
        fs::remove_dir_all(anew.paths.volume("gold")).unwrap();
        assert_eq!(anew.uid_on("gold"), identity.node);
    }

    /// A failed metadata write may still land after the volume was detached and attached again.
    #[test]
    fn a_detached_volume_leaves_what_is_known_of_its_metadata_writes() {
        let folder = tempfile::tempdir().unwrap();
        let node = Supervisor::recording(folder.path());
        let ledger = node.paths.metadata_writes().join("ledger");
        for path in [&ledger, &node.paths.volume("gold").join("gate")] {
            files::replace(path, b"1", 0o600).unwrap();
        }
        node.detach_volume("gold").unwrap();
        assert!(!node.paths.volume("gold").exists());
        assert!(ledger.exists());
        assert_eq!(
            node.launched(),
            "remove-cgroup bascule-critical/volume-gold\n"
        );
    }

    #[test]
    fn an_attachment_of_a_release_that_noted_no_uid_is_served_under_the_nodes() {
        let json = serde_json::json!({
            "backing": attachment(None).backing,
            "volume": null,
            "cluster": ClusterId::random(),
        });
        let read: Attachment = serde_json::from_value(json).unwrap();
        let node = NodeUid::random();
        assert_eq!(read.holder(node), node);
    }

    #[test]
    fn a_watchdogs_process_that_was_killed_has_ended_and_one_that_is_frozen_has_not() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("watchdog.sock");
        assert!(watchdog_has_ended(&socket), "never started");
        let listening = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(!watchdog_has_ended(&socket), "no process listens");
        drop(listening);
        assert!(watchdog_has_ended(&socket), "its socket file is left");
    }

    #[test]
    fn only_given_times_are_passed_to_format() {
        let options = FormatOptions {
            lease_ms: Some(4000),
            ..FormatOptions::new(FencingMode::LeaseOnly)
        };
        assert_eq!(
            format_flags(&options),
            ["--fencing", "lease-only", "--lease-ms", "4000"]
        );
    }
}
