//! Bringing a lab up.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use crate::addresses::Families;
use crate::audit;
use crate::cgroup::Cgroup;
use crate::command::Run;
use crate::down::{self, down};
use crate::emulated;
use crate::hub::Hub;
use crate::image::pause_archive;
use crate::init::DiskSpec;
use crate::kept::{self, keep_from_env};
use crate::lab::{Lab, print_logs};
use crate::names::{NodeIndex, SHARED_DISK};
use crate::native;
use crate::node_conf::{NodeFiles, NodePlan, write_conf};
use crate::options::{Options, Watchdog, images_from_env};
use crate::pki::Pki;
use crate::progress::step;
use crate::state::{LabPaths, NodeRecord, State, Tier, boot_id};
use crate::tools::{PACKAGES, PACKAGES_EMULATED, Tools, ensure_packages, lab_binary};
use crate::wait::wait_for;

impl Lab {
    /// A native lab of `nodes` nodes for one test. It is taken down when the value is dropped, and by the guard
    /// process when the test is killed. Concurrent tests wait for each other.
    ///
    /// The image archives in `BASCULE_LAB_IMAGES` (separated by `:`) are imported.
    pub fn native(nodes: u8) -> Result<Self> {
        Self::for_test(Tier::Native, nodes)
    }

    /// An emulated lab of `nodes` nodes for one test, as [`Self::native`].
    pub fn emulated(nodes: u8) -> Result<Self> {
        Self::for_test(Tier::Emulated, nodes)
    }

    /// A lab of `nodes` nodes of this tier for one test, named by `BASCULE_LAB`, or `test`: runs with different names
    /// can go on side by side.
    ///
    /// With `BASCULE_LAB_SAN=1` emulated nodes are connected to a SAN. With `BASCULE_LAB_KEEP=1` the lab stays up when the test
    /// ends, and the next such test uses it again if it is
    /// equivalent to a new one (`kept.rs`).
    pub fn for_test(tier: Tier, nodes: u8) -> Result<Self> {
        Self::for_test_on(tier, tier.families(), nodes)
    }

    /// As [`Self::for_test`], with these address families.
    pub fn for_test_on(tier: Tier, families: Families, nodes: u8) -> Result<Self> {
        let name = std::env::var("BASCULE_LAB").unwrap_or_else(|_| "test".into());
        let mut options = Options::new(name.parse()?, tier, nodes);
        options.families = families;
        options.images = images_from_env();
        options.san = tier == Tier::Emulated && std::env::var_os("BASCULE_LAB_SAN").is_some();
        options.ephemeral = !keep_from_env();
        let session = LabPaths::new(&options.name)?.lock_session()?;
        let kept = if options.ephemeral {
            None
        } else {
            kept::take_again(&options)
        };
        let mut lab = match kept {
            Some(lab) => lab,
            None => Self::up(&options)?,
        };
        lab.session_lock = Some(session);
        Ok(lab)
    }

    /// Brings a lab up. An existing lab of the same name is removed first.
    ///
    /// # Errors
    /// When a component does not start in time: the last lines of all logs are printed and the lab is taken down.
    pub fn up(options: &Options) -> Result<Self> {
        up(options)
    }
}

/// See [`Lab::up`].
fn up(options: &Options) -> Result<Lab> {
    ensure!(rustix::process::geteuid().is_root(), "a lab needs root");
    let nodes = options.node_indices()?;
    let (tools, assets) = prepare_for(options.tier, &options.images)?;

    let paths = LabPaths::new(&options.name)?;
    let lock = paths.lock()?;
    down::clear(&options.name, &paths)?;
    let state = new_state(options, &paths)?;
    state.save(&paths)?;
    start_guard(options)?;
    let hub = Hub::new(&options.name);
    let mut lab = Lab {
        state,
        paths,
        tools,
        hub,
        ephemeral: options.ephemeral,
        session_lock: None,
    };
    let outcome = build(&mut lab, options, &nodes, assets.as_ref());
    drop(lock);
    match outcome {
        Ok(()) => Ok(lab),
        Err(error) => {
            print_logs(lab.logs());
            lab.ephemeral = false;
            down(&options.name).context("clean up after a failed start")?;
            Err(error)
        }
    }
}

/// Installs and builds everything that labs of this tier need, the pause image included. Cached results are kept.
pub fn prepare(tier: Tier) -> Result<()> {
    prepare_for(tier, &[])?;
    pause_archive().map(drop)
}

fn prepare_for(tier: Tier, images: &[PathBuf]) -> Result<(Tools, Option<emulated::Assets>)> {
    ensure_packages(PACKAGES)?;
    if tier == Tier::Emulated {
        ensure_packages(PACKAGES_EMULATED)?;
    }
    let tools = Tools::ensure()?;
    let assets = match tier {
        Tier::Native => None,
        Tier::Emulated => Some(emulated::Assets::ensure(&tools, images)?),
    };
    Ok((tools, assets))
}

fn build(
    lab: &mut Lab,
    options: &Options,
    nodes: &[NodeIndex],
    assets: Option<&emulated::Assets>,
) -> Result<()> {
    Cgroup::at(options.name.cgroup())?.create()?;
    lab.hub.create(options.families)?;
    let device = make_shared_disk(lab, options)?;
    let pki = Pki::create(&lab.paths.pki(), options.families.first())?;
    step("starting the control plane", || {
        lab.control_plane().start_all(&pki)
    })?;
    if let Some(assets) = assets {
        emulated::prepare_lab(lab, assets, options)?;
    }
    let plan = plan(lab, options, nodes, device)?;
    for &node in nodes {
        let files = NodeFiles::at(lab.paths.node(&node.name()));
        let native = match options.tier {
            Tier::Native => Some(native::native_spec(&files)?),
            Tier::Emulated => None,
        };
        write_conf(&files, node, &plan, native, &pki)?;
        if let Some(assets) = assets {
            emulated::prepare_node(lab, node, assets, options)?;
            if options.watchdog == Watchdog::Bmc {
                emulated::start_bmc(lab, node)?;
            }
        }
        lab.state.nodes.push(NodeRecord {
            index: node,
            machine: None,
        });
    }
    lab.state.save(&lab.paths)?;
    step(&format!("starting {} nodes", nodes.len()), || {
        for node in lab.nodes() {
            node.boot()?;
        }
        lab.nodes()
            .try_for_each(|node| node.wait_ready(ready_deadline(options.tier)))
    })?;
    // Pods cannot be created before it exists.
    wait_for(
        "the default service account",
        Duration::from_secs(60),
        || lab.kubectl(&["-n", "default", "get", "serviceaccount", "default"]),
    )?;
    lab.record(|state| state.complete = true)?;
    lab.state = lab.recorded()?;
    Ok(())
}

fn new_state(options: &Options, paths: &LabPaths) -> Result<State> {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .context("the clock is before 1970")?;
    let logs = paths.logs().join(since.as_millis().to_string());
    let audit = audit::dir(&logs);
    for dir in [&paths.dir(), &paths.disks(), &paths.web(), &logs, &audit] {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    Ok(State {
        version: crate::state::STATE_VERSION,
        name: options.name.clone(),
        tier: options.tier,
        families: options.families,
        boot_id: boot_id()?,
        logs,
        nodes: Vec::new(),
        complete: false,
        ephemeral: options.ephemeral,
        contents: kept::contents(options)?,
        unfinished: None,
    })
}

/// Creates the shared disk's file. Returns its loop device in the native tier.
fn make_shared_disk(lab: &Lab, options: &Options) -> Result<Option<PathBuf>> {
    let path = lab.shared_disk();
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    file.set_len(options.shared_disk_bytes)
        .context("size the shared disk")?;
    if options.tier == Tier::Emulated {
        return Ok(None);
    }
    // Direct I/O: otherwise reads would be served by the host's page cache.
    let device = Run::new("losetup")
        .args(["--find", "--show", "--direct-io=on"])
        .arg(&path)
        .text()?;
    Ok(Some(PathBuf::from(device.trim())))
}

fn plan(
    lab: &Lab,
    options: &Options,
    nodes: &[NodeIndex],
    device: Option<PathBuf>,
) -> Result<NodePlan> {
    let disks = vec![DiskSpec {
        serial: SHARED_DISK.to_owned(),
        device,
    }];
    if options.tier == Tier::Emulated {
        return Ok(emulated::plan(nodes, disks, options));
    }
    let program =
        |name: &str| -> Result<String> { Ok(lab.tools.path(name)?.to_string_lossy().into_owned()) };
    let mut images = vec![pause_archive()?];
    images.extend(options.images.iter().cloned());
    let dirs = lab
        .tools
        .dirs()
        .iter()
        .map(|dir| dir.to_string_lossy().into_owned());
    let system = SYSTEM_PATH.split(':').map(str::to_owned);
    Ok(NodePlan {
        tier: options.tier,
        families: options.families,
        nodes: nodes.to_vec(),
        containerd: program("containerd")?,
        kubelet: program("kubelet")?,
        kube_proxy: program("kube-proxy")?,
        path: dirs.chain(system).collect::<Vec<_>>().join(":"),
        images,
        disks,
        san: false,
        late_modules: Vec::new(),
        logs: Some(lab.state.logs.clone()),
    })
}

/// Starts the process that takes the lab down if this one ends early ([`crate::guard`]).
fn start_guard(options: &Options) -> Result<()> {
    let parent = std::process::id().to_string();
    Command::new(lab_binary()?)
        .args([
            "guard",
            "--lab",
            options.name.as_str(),
            "--process",
            &parent,
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("start the lab's guard")
        .map(drop)
}

/// Measured: 3 s native; 66 s for three emulated nodes on 2 idle cores, several times that beside a build.
fn ready_deadline(tier: Tier) -> Duration {
    match tier {
        Tier::Native => Duration::from_secs(120),
        Tier::Emulated => Duration::from_secs(600),
    }
}

/// Debian's default `PATH` of root.
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
