//! The probe guest under our VMM: a `bascule-vm` process and its control socket.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bascule_ipc::vm::{
    Boot, DiskConfig, DiskSource, GuestAgent, GuestInfo, Home, ImageSource, InterfaceConfig,
    MigrationPhase, MigrationStatus, Request, Response, StartMode, StopReason, VmConfig, VmState,
    VmStatus,
};
use bascule_ipc::{Connection, Kind, volume};
use bascule_types::{Bytes, OnPanic, Ownership, VmUid};

use crate::{Child, Network, Tap, binary, probe, wait_for};

/// A `bascule-vm` with the probe guest; killed when dropped.
#[derive(Debug)]
pub struct TestVm {
    child: Child,
    control: Connection,
    directory: PathBuf,
}

/// Configuration of a [`TestVm`], as a builder: `TestVmSpec::probe().with_memory_mib(256).with_disk(path)`.
#[derive(Clone, Debug)]
pub struct TestVmSpec {
    config: VmConfig,
    fault: Option<String>,
    rogue: Option<String>,
    rogue_requests: Option<String>,
}

impl TestVmSpec {
    /// One vCPU, 128 MiB, the probe guest, no devices, no volume.
    ///
    /// # Errors
    /// When the guest does not build.
    pub fn probe() -> Result<Self> {
        let kernel = ImageSource::File {
            path: probe::build()?.to_owned(),
        };
        let cmdline = probe::POWER_BUTTON.to_owned();
        Ok(Self {
            config: VmConfig {
                version: VmConfig::VERSION,
                uid: VmUid::random(),
                name: "e2e/probe".to_owned(),
                cpus: 1,
                memory: Bytes::mib(128),
                boot: Boot {
                    kernel,
                    initrd: None,
                    cmdline,
                },
                disks: Vec::new(),
                interfaces: Vec::new(),
                home: None,
                start: StartMode::Boot,
                tls_dir: None,
                shutdown_timeout_ms: None,
                cloud_init: None,
                user: None,
                guest_agent: false,
                on_panic: OnPanic::default(),
            },
            fault: None,
            rogue: None,
            rogue_requests: None,
        })
    }

    /// So many vCPUs.
    #[must_use]
    pub fn with_cpus(mut self, cpus: u8) -> Self {
        self.config.cpus = cpus;
        self
    }

    /// Guest RAM in MiB.
    #[must_use]
    pub fn with_memory_mib(mut self, mib: u32) -> Self {
        self.config.memory = Bytes::mib(mib);
        self
    }

    /// With these options for the guest (`bascule_probe_wire::options`), besides those it has.
    #[must_use]
    pub fn with_options(mut self, options: &str) -> Self {
        self.config.boot.cmdline = format!("{} {options}", self.config.boot.cmdline);
        self
    }

    /// With a disk in a file.
    #[must_use]
    pub fn with_disk(mut self, path: &Path) -> Self {
        let source = DiskSource::File {
            path: path.to_owned(),
            read_only: false,
        };
        self.config.disks.push(DiskConfig {
            name: "data".to_owned(),
            source,
            on_error: bascule_types::OnError::Report,
        });
        self
    }

    /// With an interface on a tap.
    #[must_use]
    pub fn with_interface(self, tap: &Tap) -> Self {
        let index = u8::try_from(self.config.interfaces.len()).unwrap_or(u8::MAX);
        self.with_interface_of(tap, [0x52, 0x54, 0, 0x77, index, 5])
    }

    /// With an interface on a tap that has this address.
    #[must_use]
    pub fn with_interface_of(mut self, tap: &Tap, mac: [u8; 6]) -> Self {
        self.config.interfaces.push(InterfaceConfig {
            tap: tap.name.clone(),
            mac,
            mtu: None,
            bridge: String::new(),
        });
        self
    }

    /// Injects a fault at a point of a migration: `<point>=kill|fail`, as `bascule_vmm::migration::fault`
    /// names them. Needs a `bascule-vm` with the feature `fault-injection`, which tests build.
    #[must_use]
    pub fn with_fault(mut self, fault: &str) -> Self {
        self.fault = Some(fault.to_owned());
        self
    }

    /// A process that makes the attempts of `node-daemon/vmm/src/process/rogue.rs` as soon as it has its machine; `others` is
    /// the value of `BASCULE_ROGUE`. Needs the feature `fault-injection` too.
    #[must_use]
    pub fn with_rogue(mut self, others: &str) -> Self {
        self.rogue = Some(others.to_owned());
        self
    }

    /// A rogue that also makes these requests to the process of its home volume.
    ///
    /// # Errors
    /// When they cannot be written down.
    pub fn with_rogue_requests(mut self, requests: &[volume::Request]) -> Result<Self> {
        let text = serde_json::to_string(requests).context("write the requests")?;
        self.rogue_requests = Some(text);
        Ok(self)
    }

    /// The configuration, for fields without a builder method.
    pub fn config_mut(&mut self) -> &mut VmConfig {
        &mut self.config
    }

    /// The same VM as the destination of a live migration.
    #[must_use]
    pub fn incoming(mut self, tap: &Tap, home: Option<Home>, start: StartMode) -> Self {
        self.config
            .interfaces
            .iter_mut()
            .for_each(|nic| nic.tap.clone_from(&tap.name));
        self.config.home = home;
        self.config.start = start;
        self
    }
}

impl TestVm {
    /// Starts the process within `network`, on the node whose run directory is `run_dir`.
    ///
    /// # Errors
    /// When it does not start; the error shows its log.
    pub fn start(network: &Network, run_dir: &Path, spec: &TestVmSpec) -> Result<Self> {
        let directory = run_dir.join("vms").join(spec.config.uid.to_string());
        // As `bascule-node` does: its files are of the user of the VM's previous process here.
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).context("remove the VM's earlier run directory");
            }
            _ => {}
        }
        fs::create_dir_all(&directory).context("make the VM's run directory")?;
        if let Some(user) = &spec.config.user {
            chown(&directory, None, Some(user.id)).context("share the run directory")?;
            fs::set_permissions(&directory, fs::Permissions::from_mode(0o1770))
                .context("share the run directory")?;
        }
        let config = directory.join("config.json");
        let text = serde_json::to_vec_pretty(&spec.config).context("write the configuration")?;
        fs::write(&config, text).context("write the configuration")?;
        // SIGXFSZ is ignored, so that a write beyond a limit is an error: see `Self::fail_writes`.
        let mut command = network.command("sh");
        command
            .args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""])
            .arg(binary("bascule-vmm", "bascule-vm")?)
            .arg("--config")
            .arg(&config)
            .env("RUST_LOG", "debug");
        if let Some(fault) = &spec.fault {
            command.env("BASCULE_FAULT", fault);
        }
        if let Some(others) = &spec.rogue {
            command.env("BASCULE_ROGUE", others);
        }
        if let Some(requests) = &spec.rogue_requests {
            command.env("BASCULE_ROGUE_REQUESTS", requests);
        }
        let log = directory.join("test.log");
        let mut child = Child::spawn("bascule-vm", &mut command, &log)?;
        let control = connect(&directory, &mut child)
            .with_context(|| format!("log: {}", fs::read_to_string(&log).unwrap_or_default()))?;
        let mut vm = Self {
            child,
            control,
            directory,
        };
        wait_for("a machine", START_TIME, || {
            Ok((vm.status()?.state != VmState::Starting).then_some(()))
        })
        .with_context(|| format!("log: {}", vm.log()))?;
        Ok(vm)
    }

    /// Pending operations of the VM, such as a disk write, as the process reports them.
    ///
    /// # Errors
    /// When the process does not respond.
    pub fn waits_for(&mut self) -> Result<Option<String>> {
        match self.ask(&Request::WaitsFor)? {
            Response::WaitsFor(what) => Ok(what),
            other => bail!("WaitsFor was answered by {other:?}"),
        }
    }

    /// Makes every write of the process beyond `offset` (bytes) of a file fail from now on, as a
    /// failed device does.
    ///
    /// # Errors
    /// When the kernel does not.
    pub fn fail_writes(&self, offset: u64) -> Result<()> {
        let pid = self.child.pid();
        let path = format!("/proc/{pid}/status");
        let status = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let id = |name: &str| -> Result<u32> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let id = line.and_then(|ids| ids.split_whitespace().next());
            let id = id.with_context(|| format!("{path} has no {name}"))?;
            id.parse().with_context(|| format!("{name} {id} in {path}"))
        };
        // The limits of a process of another user need CAP_SYS_RESOURCE, which root may lack (prlimit(2)).
        let limited = Command::new("prlimit")
            .arg(format!("--pid={pid}"))
            .arg(format!("--fsize={offset}:unlimited"))
            .uid(id("Uid:")?)
            .gid(id("Gid:")?)
            .status()
            .context("run prlimit")?;
        ensure!(limited.success(), "prlimit ended with {limited}");
        Ok(())
    }

    /// Sends a request and returns the response.
    ///
    /// # Errors
    /// When there is no response.
    pub fn ask(&mut self, request: &Request) -> Result<Response> {
        let (response, _) = self
            .control
            .call::<_, Response>(request)
            .with_context(|| format!("ask for {request:?}; log: {}", self.log()))?;
        Ok(response)
    }

    /// Sends a request that must succeed.
    ///
    /// # Errors
    /// When it is refused or there is no response.
    pub fn must(&mut self, request: &Request) -> Result<()> {
        match self.ask(request)? {
            Response::Accepted => Ok(()),
            other => bail!("{request:?} was answered by {other:?}"),
        }
    }

    /// State of the VM.
    ///
    /// # Errors
    /// When the process does not respond.
    pub fn status(&mut self) -> Result<VmStatus> {
        match self.ask(&Request::Status)? {
            Response::Status(status) => Ok(*status),
            other => bail!("Status was answered by {other:?}"),
        }
    }

    /// Waits for a state.
    ///
    /// # Errors
    /// When it does not come; the error shows the one that is there.
    pub fn wait_state(&mut self, wanted: &VmState, limit: Duration) -> Result<()> {
        let mut last = None;
        wait_for(&format!("state {wanted:?}"), limit, || {
            last = Some(self.status()?.state);
            Ok((last.as_ref() == Some(wanted)).then_some(()))
        })
        .with_context(|| format!("state {last:?}; log: {}", self.log()))
    }

    /// Waits until the guest is off and returns the reason.
    ///
    /// # Errors
    /// When it is still running after the limit.
    pub fn wait_stopped(&mut self, limit: Duration) -> Result<StopReason> {
        wait_for("the guest's end", limit, || match self.status()?.state {
            VmState::Stopped(reason) => Ok(Some(reason)),
            _ => Ok(None),
        })
        .with_context(|| format!("log: {}", self.log()))
    }

    /// Waits until the machine was reset `count` times.
    ///
    /// # Errors
    /// When it was not within the limit, or the guest ended.
    pub fn wait_resets(&mut self, count: u32, limit: Duration) -> Result<VmStatus> {
        wait_for(&format!("reset number {count}"), limit, || {
            let status = self.status()?;
            ensure!(
                status.state == VmState::Running,
                "the VM is {:?}",
                status.state
            );
            Ok((status.resets.count >= count).then_some(status))
        })
        .with_context(|| format!("log: {}", self.log()))
    }

    /// Waits for what the guest's agent says.
    ///
    /// # Errors
    /// When it does not answer within the limit.
    pub fn wait_agent(&mut self, limit: Duration) -> Result<GuestInfo> {
        wait_for("an answer of the guest's agent", limit, || {
            match self.status()?.guest_agent {
                Some(GuestAgent::Connected(info)) => Ok(Some(*info)),
                _ => Ok(None),
            }
        })
        .with_context(|| format!("log: {}", self.log()))
    }

    /// Waits until an incoming VM reports its listening address.
    ///
    /// # Errors
    /// When it does not.
    pub fn wait_listening(&mut self, limit: Duration) -> Result<SocketAddr> {
        wait_for("an address to migrate to", limit, || {
            Ok(self.status()?.listening)
        })
        .with_context(|| format!("log: {}", self.log()))
    }

    /// Waits for the end of a migration, successful or not.
    ///
    /// # Errors
    /// When it does not end.
    pub fn wait_migration(&mut self, limit: Duration) -> Result<MigrationStatus> {
        wait_for("the end of the migration", limit, || {
            let migration = self.status()?.migration;
            Ok(migration.filter(|migration| has_ended(migration.phase)))
        })
        .with_context(|| format!("log: {}", self.log()))
    }

    /// The guest's console, as soon as there is a guest. Attach once per process: each attachment
    /// receives the whole history.
    ///
    /// # Errors
    /// When it is refused; the error contains the VM's state.
    pub fn console(&mut self) -> Result<UnixStream> {
        wait_for("a guest with a console", START_TIME, || {
            let state = self.status()?.state;
            ensure!(!matches!(state, VmState::Stopped(_)), "the VM is {state:?}");
            Ok((state != VmState::Starting).then_some(()))
        })
        .with_context(|| format!("log: {}", self.log()))?;
        let (response, fds) = self
            .control
            .call::<_, Response>(&Request::Console)
            .context("ask for the console")?;
        ensure!(
            response == Response::Accepted,
            "Console was answered by {response:?}"
        );
        let fd = fds
            .into_iter()
            .next()
            .context("the answer has no file descriptor")?;
        Ok(UnixStream::from(fd))
    }

    /// Closes the control connection, as when the node daemon is killed, and opens a new one.
    ///
    /// # Errors
    /// When the process does not take another.
    pub fn reconnect(&mut self) -> Result<()> {
        self.control = connect(&self.directory, &mut self.child)?;
        Ok(())
    }

    /// Releases the process of a stopped or migrated VM and returns its exit status.
    ///
    /// # Errors
    /// When it refuses or stays.
    pub fn exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        match self.control.call::<_, Response>(&Request::Exit) {
            Ok((Response::Accepted, _)) => {}
            Ok((other, _)) => bail!("Exit was answered by {other:?}"),
            // It may be gone before its answer arrives.
            Err(error) if error.kind() == Kind::Gone => {}
            Err(error) => return Err(error).context("ask for Exit"),
        }
        self.child.wait(limit)
    }

    /// The `bascule-vm` process, for signals and for waiting on its end.
    pub fn process(&mut self) -> &mut Child {
        &mut self.child
    }

    /// The VM's run directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The ownership record that the process keeps in its run directory, for recovery when the
    /// process does not respond.
    ///
    /// # Errors
    /// When it has written none.
    pub fn written_ownership(&self) -> Result<Ownership> {
        let path = self.directory.join("ownership.json");
        let json = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&json).with_context(|| format!("read {}", path.display()))
    }

    /// The process's standard output, standard error and log.
    #[must_use]
    pub fn log(&self) -> String {
        let read = |name| fs::read_to_string(self.directory.join(name)).unwrap_or_default();
        read("test.log") + &read("vm.log")
    }
}

fn connect(directory: &Path, child: &mut Child) -> Result<Connection> {
    let socket = directory.join("vm.sock");
    wait_for("the VM's control socket", START_TIME, || {
        match child.ended()? {
            Some(status) => bail!("bascule-vm ended with {status}"),
            None => Ok(Connection::connect(&socket, ANSWER_TIME).ok()),
        }
    })
}

const fn has_ended(phase: MigrationPhase) -> bool {
    match phase {
        MigrationPhase::Preparing
        | MigrationPhase::PreCopy
        | MigrationPhase::Stopping
        | MigrationPhase::Committing => false,
        MigrationPhase::Completed
        | MigrationPhase::Cancelled
        | MigrationPhase::Failed
        | MigrationPhase::NotConverging => true,
    }
}

const START_TIME: Duration = Duration::from_secs(30);
const ANSWER_TIME: Duration = Duration::from_secs(10);
