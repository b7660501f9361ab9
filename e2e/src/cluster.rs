//! Nodes on one shared volume, without Kubernetes and without `bascule-node`: a certificate
//! authority, a volume in a file, and one `bascule-volume` per node, all in one network.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bascule_ipc::Connection;
use bascule_ipc::vm::{
    DiskConfig, DiskSource, Home, ImageSource, ProcessUser, StartMode, VmConfig,
};
use bascule_ipc::volume::{Request, Response, Rows, VolumeStatus};
use bascule_pki::Authority;
use bascule_types::{
    Answer, AttemptId, Bytes, Change, ClusterId, DiskRole, DiskRow, Epoch, NodeUid, Owner, RowName,
    UserRange, VmUid,
};

use crate::{Child, Network, TestVm, TestVmSpec, binary, probe, wait_for};

/// The network, the certificate authority and the volume that nodes share.
#[derive(Debug)]
pub struct TestCluster {
    /// Where all of it runs.
    pub network: Network,
    directory: tempfile::TempDir,
    authority: Authority,
    cluster: ClusterId,
}

/// One node: its run directory and its `bascule-volume`.
#[derive(Debug)]
pub struct TestNode {
    name: String,
    uid: NodeUid,
    index: u16,
    run_dir: PathBuf,
    tls_dir: PathBuf,
    volume: Child,
}

/// A VM on the volume: its ownership record, its disk and its kernel.
#[derive(Clone, Debug)]
pub struct VmOnVolume {
    /// UID of the VM.
    pub uid: VmUid,
    spec: TestVmSpec,
}

impl VmOnVolume {
    /// The same VM with a fault injected into its process at a point of a migration: see
    /// [`TestVmSpec::with_fault`].
    #[must_use]
    pub fn with_fault(&self, fault: &str) -> Self {
        let mut broken = self.clone();
        broken.spec = broken.spec.with_fault(fault);
        broken
    }

    /// The same VM with a changed configuration.
    #[must_use]
    pub fn configured(&self, change: impl FnOnce(&mut VmConfig)) -> Self {
        let mut vm = self.clone();
        change(vm.spec.config_mut());
        vm
    }
}

impl TestCluster {
    /// A volume of `volume_mib`, formatted for a first node, and that node.
    ///
    /// # Errors
    /// When a step fails.
    pub fn new(volume_mib: u32) -> Result<(Self, TestNode)> {
        let cluster = ClusterId::random();
        let (authority, _) = Authority::create("e2e").context("make an authority")?;
        let directory = tempfile::tempdir().context("make a directory")?;
        let this = Self {
            network: Network::new()?,
            directory,
            authority,
            cluster,
        };
        let first = NodeUid::random();
        let mut format = Command::new(binary("bascule-volume", "bascule-volume")?);
        format.arg("format").arg(this.volume());
        format.args([
            "--cluster",
            &cluster.to_string(),
            "--first-node",
            &first.to_string(),
        ]);
        format.args([
            "--fencing",
            "lease-only",
            "--create",
            &volume_mib.to_string(),
        ]);
        let output = format.output().context("run bascule-volume format")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "bascule-volume format fails: {said}"
        );
        let node = this.start_node(first, 0)?;
        Ok((this, node))
    }

    /// A further node, registered through `other`.
    ///
    /// # Errors
    /// When its registration is refused.
    pub fn join(&self, index: u16, other: &TestNode) -> Result<TestNode> {
        let node = NodeUid::random();
        other.change(Change::RegisterNode { node })?;
        self.start_node(node, index)
    }

    /// Creates a VM on the volume through `node`: its record, a data disk of `disk_mib` MiB and the
    /// probe guest as its kernel. The rest of the configuration is `spec`.
    ///
    /// # Errors
    /// When the volume refuses.
    pub fn install(&self, node: &TestNode, spec: TestVmSpec, disk_mib: u32) -> Result<VmOnVolume> {
        let mut spec = spec;
        let uid = spec.config_mut().uid;
        let name = |what: &str| RowName::new(format!("e2e/{uid}-{what}")).context("name a row");
        node.change(Change::CreateVm {
            vm: uid,
            name: name("vm")?,
            spec_digest: [7; 32],
        })?;
        let data = name("data")?;
        let size = Bytes::mib(disk_mib);
        let (vm, role) = (uid, DiskRole::Data);
        node.change(Change::CreateDisk {
            vm,
            name: data.clone(),
            size,
            role,
            importing: false,
        })?;
        self.import_kernel(node, uid, &name("kernel")?)?;
        let config = spec.config_mut();
        config.boot.kernel = ImageSource::Volume {
            disk: name("kernel")?.as_str().to_owned(),
        };
        let source = DiskSource::Volume {
            disk: data.as_str().to_owned(),
            read_only: false,
        };
        config.disks = vec![DiskConfig {
            name: "data".to_owned(),
            source,
            on_error: bascule_types::OnError::Report,
        }];
        Ok(VmOnVolume { uid, spec })
    }

    /// Acquires ownership of the VM for `node` and boots it there.
    ///
    /// # Errors
    /// When the volume or the VMM refuses.
    pub fn boot(&self, node: &TestNode, vm: &VmOnVolume, expected_epoch: Epoch) -> Result<TestVm> {
        let to = node.owner()?;
        let acquired = node.change(Change::Acquire {
            vm: vm.uid,
            expected_epoch,
            to,
        })?;
        let Answer::Row(row) = acquired else {
            bail!("Acquire was answered by {acquired:?}")
        };
        self.start(node, vm, row.epoch, StartMode::Boot)
    }

    /// Starts the destination process of a live migration on `node`. `epoch` is the source's.
    ///
    /// # Errors
    /// When the VMM refuses.
    pub fn expect(
        &self,
        node: &TestNode,
        vm: &VmOnVolume,
        epoch: Epoch,
        attempt: AttemptId,
    ) -> Result<TestVm> {
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        self.start(
            node,
            vm,
            epoch,
            StartMode::Incoming {
                listen,
                ports: None,
                attempt,
            },
        )
    }

    /// Starts the VM's process at `node`, with an interface of its own if it has none.
    ///
    /// # Errors
    /// When the VMM refuses.
    pub fn start(
        &self,
        node: &TestNode,
        vm: &VmOnVolume,
        epoch: Epoch,
        start: StartMode,
    ) -> Result<TestVm> {
        let home = Home {
            socket: node.volume_socket(),
            owner: node.owner()?,
            epoch,
        };
        let mut spec = vm.spec.clone();
        if spec.config_mut().interfaces.is_empty() {
            spec = spec.with_interface(&self.network.tap()?);
        }
        let config = spec.config_mut();
        config.home = Some(home);
        config.start = start;
        config.tls_dir = Some(node.tls_dir.clone());
        config.user = next_user();
        TestVm::start(&self.network, &node.run_dir, &spec)
    }

    /// The file that the volume is in.
    #[must_use]
    pub fn volume(&self) -> PathBuf {
        self.directory.path().join("volume.img")
    }

    /// Reads a VM's disk at `offset` (bytes) directly from the volume's file.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read_disk(&self, row: &DiskRow, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let file = File::open(self.volume()).context("open the volume")?;
        let mut start = 0;
        for run in &row.extents {
            let within = offset
                .checked_sub(start)
                .filter(|&within| within < run.length.0);
            if let Some(within) = within {
                let base = run.start.lba_to_bytes().context("place an extent")?.0;
                return file
                    .read_exact_at(bytes, base + within)
                    .context("read the volume");
            }
            start += run.length.0;
        }
        bail!("the disk ends before {offset}")
    }

    /// Writes `bytes` to the begin of a disk that no VM has open, directly to the volume's file.
    ///
    /// # Errors
    /// When the disk is shorter, or the file cannot be written.
    pub fn write_disk(&self, row: &DiskRow, bytes: &[u8]) -> Result<()> {
        let file = File::options().write(true).open(self.volume());
        let file = file.context("open the volume")?;
        let mut rest = bytes;
        for run in &row.extents {
            let room = usize::try_from(run.length.0).context("measure an extent")?;
            let (part, behind) = rest.split_at(rest.len().min(room));
            let base = run.start.lba_to_bytes().context("place an extent")?.0;
            file.write_all_at(part, base).context("write the volume")?;
            rest = behind;
        }
        ensure!(rest.is_empty(), "the disk is too short");
        file.sync_all().context("flush the volume")
    }

    fn import_kernel(&self, node: &TestNode, vm: VmUid, name: &RowName) -> Result<()> {
        let image = fs::read(probe::build()?).context("read the probe guest")?;
        let length = Bytes(u64::try_from(image.len()).context("measure the probe guest")?);
        let created = node.change(Change::CreateDisk {
            vm,
            name: name.clone(),
            size: length,
            role: DiskRole::Kernel,
            importing: true,
        })?;
        let Answer::Disk(row) = created else {
            bail!("CreateDisk was answered by {created:?}")
        };
        self.write_disk(&row, &image).context("write the kernel")?;
        node.change(Change::FinishImport {
            disk: row.disk,
            length: Some(length),
        })?;
        Ok(())
    }

    /// Starts a node's `bascule-volume` again, after it was killed.
    ///
    /// # Errors
    /// When it does not join the volume again in time.
    pub fn restart_volume(&self, node: &mut TestNode) -> Result<()> {
        node.volume = self.start_volume(node.uid, node.index, &node.run_dir, &node.tls_dir)?;
        node.wait_joined()
    }

    fn start_node(&self, uid: NodeUid, index: u16) -> Result<TestNode> {
        let name = format!("node{index}");
        let root = self.directory.path().join(&name);
        let (run_dir, tls_dir) = (root.join("run"), root.join("tls"));
        fs::create_dir_all(run_dir.join("volumes").join(VOLUME)).context("make a run directory")?;
        fs::create_dir_all(&tls_dir).context("make a directory for certificates")?;
        let identity = self
            .authority
            .issue_node(uid)
            .context("issue a certificate")?;
        fs::write(tls_dir.join("node.crt"), identity.certificate_pem).context("certificate")?;
        fs::write(tls_dir.join("node.key"), identity.key_pem).context("key")?;
        fs::write(tls_dir.join("ca.crt"), self.authority.certificate_pem()).context("CA")?;
        let volume = self.start_volume(uid, index, &run_dir, &tls_dir)?;
        let mut node = TestNode {
            name,
            uid,
            index,
            run_dir,
            tls_dir,
            volume,
        };
        node.wait_joined()?;
        Ok(node)
    }

    fn start_volume(&self, uid: NodeUid, index: u16, run: &Path, tls: &Path) -> Result<Child> {
        let folder = run.join("volumes").join(VOLUME);
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, FIRST_PORT + index));
        let mut serve = self
            .network
            .command(binary("bascule-volume", "bascule-volume")?);
        serve.arg("serve").arg("--device").arg(self.volume());
        serve.args([
            "--cluster",
            &self.cluster.to_string(),
            "--node-uid",
            &uid.to_string(),
        ]);
        serve
            .arg("--run-dir")
            .arg(&folder)
            .arg("--tls-dir")
            .arg(tls);
        serve.args(["--listen", &listen.to_string()]);
        let group = UserRange::VMS.shared_group().to_string();
        serve.args(["--socket-group", &group]);
        serve.arg("--watchdog-sock").arg(run.join("watchdog.sock"));
        Child::spawn("bascule-volume", &mut serve, &folder.join("test.log"))
    }
}

impl TestNode {
    /// Status of the volume on this node.
    ///
    /// # Errors
    /// When the process does not respond.
    pub fn status(&self) -> Result<VolumeStatus> {
        match self.ask(&Request::Status)? {
            Response::Status(status) => Ok(status),
            other => bail!("Status was answered by {other:?}"),
        }
    }

    /// All VM and disk records, from the coordinator.
    ///
    /// # Errors
    /// When there is none.
    pub fn rows(&self) -> Result<Rows> {
        match self.ask(&Request::Rows)? {
            Response::Rows(rows) => Ok(rows),
            other => bail!("Rows was answered by {other:?}"),
        }
    }

    /// This node's slot and generation.
    ///
    /// # Errors
    /// When it has none.
    pub fn owner(&self) -> Result<Owner> {
        self.status()?
            .owner
            .with_context(|| format!("{} has not joined", self.name))
    }

    /// Requests a metadata change, again while its outcome is unknown.
    ///
    /// # Errors
    /// When it is refused.
    pub fn change(&self, change: Change) -> Result<Answer> {
        let request = Request::Change(change);
        wait_for(&format!("{request:?}"), CHANGE_TIME, || {
            match self.ask(&request)? {
                Response::Granted(answer) => Ok(Some(answer)),
                Response::Unknown => Ok(None),
                other => bail!("{request:?} was answered by {other:?}"),
            }
        })
    }

    /// The node's `bascule-volume`.
    pub fn volume_process(&mut self) -> &mut Child {
        &mut self.volume
    }

    /// The node's run directory.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    fn wait_joined(&mut self) -> Result<()> {
        wait_for(
            &format!("{} to join the volume", self.name),
            JOIN_TIME,
            || {
                if let Some(status) = self.volume.ended()? {
                    bail!("bascule-volume ended with {status}");
                }
                Ok(self
                    .status()
                    .ok()
                    .filter(|status| status.lease_left_ms > 0)
                    .map(drop))
            },
        )
        .with_context(|| format!("log: {}", self.volume_log()))
    }

    /// What the node's `bascule-volume` wrote since it was last started.
    #[must_use]
    pub fn volume_log(&self) -> String {
        let path = self.run_dir.join("volumes").join(VOLUME).join("test.log");
        fs::read_to_string(path).unwrap_or_default()
    }

    /// The socket of the node's `bascule-volume`.
    #[must_use]
    pub fn volume_socket(&self) -> PathBuf {
        self.run_dir
            .join("volumes")
            .join(VOLUME)
            .join("volume.sock")
    }

    fn ask(&self, request: &Request) -> Result<Response> {
        let mut connection = Connection::connect(&self.volume_socket(), CHANGE_TIME)
            .with_context(|| format!("connect to the volume of {}", self.name))?;
        let (response, _) = connection.call(request).context("ask the volume")?;
        Ok(response)
    }
}

/// A user that no other VM process of this test has.
fn next_user() -> Option<ProcessUser> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let users = UserRange::VMS;
    let id = users
        .users_from(COUNT.fetch_add(1, Ordering::Relaxed))
        .next()?;
    let groups = vec![users.shared_group()];
    Some(ProcessUser { id, groups })
}

const VOLUME: &str = "shared";
const FIRST_PORT: u16 = 17_000;
/// The first lease takes the volume's watch time, so that a previous one has expired.
const JOIN_TIME: Duration = Duration::from_secs(60);
const CHANGE_TIME: Duration = Duration::from_secs(30);
