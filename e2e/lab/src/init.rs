//! PID 1 of a node, in both tiers: `lab node-init`.
//!
//! It prepares the node (mounts, network, devices), supervises containerd, kubelet and kube-proxy as an init system
//! does, reaps orphans, and answers requests on the lab's control connection ([`crate::control`]), which does not use
//! the node's network and therefore works during partitions.
//!
//! Native: it runs in fresh mount, PID, UTS, IPC and cgroup namespaces and in the node's network namespace.
//! Emulated: it is what the initramfs switches to; the machine is its own.
//!
//! Read next: [`NodeSpec`], then `init/supervisor.rs`.

mod device_names;
mod machine;
mod mounts;
mod network;
mod serve;
mod supervisor;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::addresses::Families;
use crate::cgroup::Hierarchy;
use crate::config::NODE_CONF;
use crate::names::NodeIndex;
use crate::state::Tier;
use crate::wait::wait_for;
pub(crate) use serve::CONTROL;
use supervisor::{Reaper, Supervisor};

/// Configuration of a node's PID 1: `spec.json` in the node's configuration directory, written by `lab up`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSpec {
    /// This node's index.
    pub index: NodeIndex,
    /// The lab's tier.
    pub tier: Tier,
    /// The cluster's address families.
    pub families: Families,
    /// All nodes of the lab; a route is added to each node's pod network.
    pub nodes: Vec<NodeIndex>,
    /// `PATH` of services and commands.
    pub path: String,
    /// Services, in the order in which they start. The first one is containerd.
    pub services: Vec<ServiceSpec>,
    /// Image archives to import before the second service starts.
    pub images: Vec<PathBuf>,
    /// Shared disks.
    pub disks: Vec<DiskSpec>,
    /// Kernel modules of the watchdog, in load order. Loaded in the background.
    pub late_modules: Vec<String>,
    /// Native: the node's own directories on the host.
    pub native: Option<NativeSpec>,
}

/// A service of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceSpec {
    /// Its name, and its log's.
    pub name: String,
    /// Absolute path of the program, then arguments.
    pub argv: Vec<String>,
    /// Where it writes; in an emulated node the name of a virtio port.
    pub log: PathBuf,
}

/// A disk that nodes share, `/dev/disk/by-id/virtio-SERIAL` in both tiers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct DiskSpec {
    pub serial: String,
    /// Native: the host's loop device.
    pub device: Option<PathBuf>,
}

/// What only a native node needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NativeSpec {
    /// Host directory that is the node's [`NODE_CONF`].
    pub conf: PathBuf,
    /// Host directory that is the node's /var/lib.
    pub var_lib: PathBuf,
    /// Host directory that is the node's /var/log.
    pub var_log: PathBuf,
    /// The host's cgroup hierarchies, mounted anew inside.
    pub cgroups: Vec<Hierarchy>,
    /// Device nodes that the node has, as names below /dev.
    pub devices: Vec<String>,
}

/// What `lab node-init` does; it returns only when the node cannot be set up.
pub fn run(spec_file: &Path) -> Result<()> {
    ensure!(
        std::process::id() == 1,
        "node-init is the first process of a node, nothing else"
    );
    let spec: NodeSpec = {
        if spec_file.starts_with(NODE_CONF) {
            mounts::mount_machine()?;
        }
        let text = fs::read(spec_file).with_context(|| format!("read {}", spec_file.display()))?;
        serde_json::from_slice(&text).context("parse the node's specification")?
    };
    match &spec.native {
        Some(native) => mounts::mount_native(&spec, native)?,
        None => machine::prepare(&spec)?,
    }
    rustix::system::sethostname(spec.index.name().as_bytes()).context("set the host name")?;
    network::configure(&spec)?;

    let reaper = Reaper::start()?;
    let supervisor = Supervisor::new(reaper, &spec);
    load_late_modules(&spec, &supervisor)?;
    start_services(&spec, &supervisor)?;
    loop {
        // When PID 1 exits the node is gone, so errors from here on are logged, not returned.
        if let Err(error) = serve::serve(&spec, &supervisor) {
            eprintln!("node-init: serve the lab: {error:#}");
        }
        std::thread::sleep(SERVE_PAUSE);
    }
}

/// containerd first, then the images that pods need, then the rest. In a thread of its own, so that the control
/// connection answers from the beginning.
fn start_services(spec: &NodeSpec, supervisor: &Supervisor) -> Result<()> {
    let (spec, supervisor) = (spec.clone(), supervisor.clone());
    crate::command::named_thread("start", move || {
        let mut names = spec.services.iter().map(|service| service.name.clone());
        let outcome = (|| {
            if let Some(containerd) = names.next() {
                supervisor.start(&containerd)?;
                for image in &spec.images {
                    import(&supervisor, image)?;
                }
            }
            names.try_for_each(|name| supervisor.start(&name))
        })();
        if let Err(error) = outcome {
            eprintln!("node-init: start the services: {error:#}");
        }
        supervisor.set_started();
    })
}

/// The ipmi_si driver takes many seconds to detect the management controller.
fn load_late_modules(spec: &NodeSpec, supervisor: &Supervisor) -> Result<()> {
    let (modules, supervisor) = (spec.late_modules.clone(), supervisor.clone());
    crate::command::named_thread("modules", move || {
        for module in modules {
            let argv = ["modprobe".to_owned(), module];
            match supervisor.exec(&argv, None, MODULE_DEADLINE) {
                Ok(outcome) if outcome.code == Some(0) => {}
                other => eprintln!("node-init: {argv:?}: {other:?}"),
            }
        }
    })
}

/// Done once per node: the images survive a reboot.
fn import(supervisor: &Supervisor, image: &Path) -> Result<()> {
    let name = image.file_name().context("an archive has a name")?;
    let mark = Path::new(IMPORTED).join(name);
    if mark.exists() {
        return Ok(());
    }
    let image = image.to_string_lossy().into_owned();
    wait_for(&format!("the import of {image}"), IMPORT_DEADLINE, || {
        let argv =
            ["ctr", "-n", "k8s.io", "images", "import", "--local", &image].map(str::to_owned);
        let outcome = supervisor.exec(&argv, None, IMPORT_DEADLINE)?;
        ensure!(
            outcome.code == Some(0),
            "{}{}",
            outcome.stdout,
            outcome.stderr
        );
        Ok(())
    })?;
    // The image is on disk before the mark: after a power cut the mark must not exist without it.
    rustix::fs::sync();
    fs::create_dir_all(IMPORTED).with_context(|| format!("make {IMPORTED}"))?;
    fs::write(&mark, []).with_context(|| format!("write {}", mark.display()))
}

/// Directory on the node's disk with an empty file per imported archive.
const IMPORTED: &str = "/var/lib/bascule-lab/imported";

/// 25 s were measured for a management controller's.
const MODULE_DEADLINE: Duration = Duration::from_secs(180);
/// Pause between two attempts to open the control socket.
const SERVE_PAUSE: Duration = Duration::from_secs(1);
/// Seconds natively; an emulated node unpacks some ten megabytes a second.
const IMPORT_DEADLINE: Duration = Duration::from_secs(240);
