//! Nodes of the emulated tier: QEMU machines with their own kernel, /dev/kvm, watchdog, disks and network interfaces.
//!
//! # Disks (by serial number)
//! `root`: Debian, an overlay per node that survives power cuts · `bin`: the programs and image archives of this run,
//! read-only, one for all · `conf`: the node's own configuration, read-only · `shared0`: the disk that all nodes
//! share, the same file in every machine.
//!
//! # Ports (virtio)
//! `control` for the lab's requests; one per service for its log, which thus ends up on the host and survives a cut.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::audit;
use crate::cache::cache_dir;
use crate::cgroup::Cgroup;
use crate::command::Run;
use crate::control_plane::Component;
use crate::emulator::Emulator;
use crate::hub::Hub;
use crate::image::pause_archive;
use crate::init::{CONTROL, DiskSpec};
use crate::lab::Lab;
use crate::names::{MGMT_BRIDGE, NodeIndex, SHARED_DISK, VM_BRIDGE};
use crate::node_conf::{MachineContext, NodePlan};
use crate::node_image::{NodeImage, make_ext4};
use crate::options::{Options, Watchdog};
use crate::process::{Daemon, ProcessId};
use crate::progress::step;
use crate::qmp::{DISK_BUS, DISK_DEVICE, shared_drive};
use crate::san;
use crate::state::{Tier, boot_id};
use crate::tools::{Tools, lab_binary, require_static};
use crate::wait::wait_for;

/// How QEMU runs a machine's CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Accelerator {
    /// The host's own nested virtualization.
    Kvm,
    /// Emulation of an AMD processor with nested paging.
    Emulation,
}

impl Accelerator {
    fn args(self) -> [&'static str; 6] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host", "-smp", "2"],
            // More than one processor: code patching crashes or hangs the kernel inside, measured.
            // With XSAVE: CPUID 0xD does not follow XCR0 in a nested guest, whose kernel warns.
            Self::Emulation => [
                "-accel",
                "tcg,thread=multi,tb-size=512",
                "-cpu",
                "EPYC,+svm,+npt,-xsave",
                "-smp",
                "1",
            ],
        }
    }
}

/// Cached inputs of emulated nodes: system disk, programs, image archives, accelerator.
#[derive(Debug)]
pub(crate) struct Assets {
    image: NodeImage,
    emulator: Emulator,
    tools: Tools,
    archives: Vec<PathBuf>,
    accelerator: Accelerator,
}

impl Assets {
    /// Finds the inputs in the cache or makes them; they do not depend on the lab.
    pub(crate) fn ensure(tools: &Tools, archives: &[PathBuf]) -> Result<Self> {
        require_static(&lab_binary()?)?;
        let image = NodeImage::ensure()?;
        let emulator = Emulator::ensure()?;
        let accelerator = find_accelerator(&image, &emulator)?;
        let mut all = vec![pause_archive()?];
        all.extend(archives.iter().cloned());
        Ok(Self {
            image,
            emulator,
            tools: tools.clone(),
            archives: all,
            accelerator,
        })
    }
}

/// The emulated tier's [`NodePlan`].
pub(crate) fn plan(nodes: &[NodeIndex], disks: Vec<DiskSpec>, options: &Options) -> NodePlan {
    let bin = |name: &str| format!("{BIN}/bin/{name}");
    NodePlan {
        tier: Tier::Emulated,
        families: options.families,
        nodes: nodes.to_vec(),
        containerd: bin("containerd"),
        kubelet: bin("kubelet"),
        kube_proxy: bin("kube-proxy"),
        path: format!("{BIN}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        // The pause image, then the others.
        images: (0..=options.images.len())
            .map(|n| PathBuf::from(format!("{BIN}/images/{n}.tar")))
            .collect(),
        disks,
        san: options.san,
        late_modules: watchdog_modules(options.watchdog),
        logs: None,
    }
}

/// Starts the SAN, if there is to be one, and makes the disk of programs and image archives, one for all nodes.
pub(crate) fn prepare_lab(lab: &Lab, assets: &Assets, options: &Options) -> Result<()> {
    if options.san {
        lab.control_plane().start(Component::San)?;
    }
    step("packing the nodes' programs", || {
        let staging = lab.paths().disks().join("bin.d");
        fs::create_dir_all(staging.join("bin")).context("make the program directory")?;
        fs::create_dir_all(staging.join("images")).context("make the archive directory")?;
        for program in PROGRAMS {
            link_or_copy(
                &assets.tools.path(program)?,
                &staging.join("bin").join(program),
            )?;
        }
        link_or_copy(&lab_binary()?, &staging.join("bin/lab"))?;
        for (number, archive) in assets.archives.iter().enumerate() {
            link_or_copy(archive, &staging.join(format!("images/{number}.tar")))?;
        }
        let size = format!("{}M", tree_bytes(&staging)? / (1 << 20) * 21 / 20 + 64);
        make_ext4(&staging, &lab.paths().disks().join("bin.img"), &size)?;
        fs::remove_dir_all(&staging).context("remove the program directory")
    })
}

/// Makes a node's own disks and its command line. Its configuration directory is written already.
pub(crate) fn prepare_node(
    lab: &Lab,
    node: NodeIndex,
    assets: &Assets,
    options: &Options,
) -> Result<()> {
    let dir = lab.paths().node(&node.name());
    make_ext4(&dir.join("conf"), &dir.join("conf.img"), "8M")?;
    Run::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(assets.image.root())
        .arg(dir.join("root.qcow2"))
        .done()?;
    let argv = Machine {
        lab,
        node,
        dir: &dir,
        assets,
        options,
    }
    .argv();
    let text = serde_json::to_vec_pretty(&argv).context("serialize the command line")?;
    fs::write(dir.join(COMMAND_LINE), text).context("write the command line")
}

/// Starts a node's management controller, which outlives the machine.
pub(crate) fn start_bmc(lab: &Lab, node: NodeIndex) -> Result<()> {
    let (name, state) = (node.name(), lab.state());
    let cgroup = format!("{}/bmc-{name}", state.name.cgroup());
    Cgroup::at(&cgroup)?.create()?;
    let socket = lab.paths().node(&name).join(BMC_SOCKET);
    let argv = [
        lab_binary()?.to_string_lossy().into_owned(),
        "bmc".into(),
        format!("--lab={}", state.name),
        format!("--node={name}"),
        format!("--socket={}", socket.display()),
    ];
    Daemon::new(cgroup, &bmc_log(lab.logs(), node), argv).start()?;
    wait_for(
        &format!("the management controller of {name}"),
        Duration::from_secs(10),
        || {
            ensure!(socket.exists(), "no {}", socket.display());
            Ok(())
        },
    )
}

/// Log of a node's management controller.
pub(crate) fn bmc_log(logs: &Path, node: NodeIndex) -> PathBuf {
    logs.join(format!("{}-bmc.log", node.name()))
}

fn watchdog_modules(watchdog: Watchdog) -> Vec<String> {
    let modules: &[&str] = match watchdog {
        Watchdog::Board => &["i6300esb"],
        Watchdog::Bmc => &["ipmi_si", "ipmi_devintf", "ipmi_watchdog"],
    };
    modules.iter().map(|&module| module.to_owned()).collect()
}

/// Powers a machine on and returns its QEMU process. Killing that process is a power cut.
pub(crate) fn start(context: &MachineContext<'_>, node: NodeIndex) -> Result<ProcessId> {
    let name = node.name();
    let hub = Hub::new(context.name);
    for bridge in [MGMT_BRIDGE, VM_BRIDGE] {
        let port = Hub::port(bridge, node);
        // Left from the last boot; absent on the first.
        hub.run("ip").args(["link", "delete", &port]).output()?;
        hub.ip(&["tuntap", "add", &port, "mode", "tap"])?;
        hub.ip(&["link", "set", &port, "master", bridge])?;
        hub.ip(&["link", "set", &port, "up"])?;
    }
    hub.route_pods(context.families, node)?;
    let cgroup = format!("{}/{name}", context.name.cgroup());
    Cgroup::at(&cgroup)?.create()?;
    let argv = fs::read(context.files.dir.join(COMMAND_LINE)).context("read the command line")?;
    let argv: Vec<String> = serde_json::from_slice(&argv).context("parse the command line")?;
    let log = context.logs.join(format!("{name}-qemu.log"));
    Daemon::new(cgroup, &log, argv)
        .in_netns(context.name.hub_netns())
        .start()
}

/// Builder of a QEMU command line.
struct Args(Vec<String>);

impl Args {
    fn add(&mut self, words: &[&str]) {
        self.0.extend(words.iter().map(|&word| word.to_owned()));
    }

    fn device(&mut self, device: &str) {
        self.add(&["-device", device]);
    }
}

fn show(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

struct Machine<'a> {
    lab: &'a Lab,
    node: NodeIndex,
    dir: &'a Path,
    assets: &'a Assets,
    options: &'a Options,
}

impl Machine<'_> {
    fn argv(&self) -> Vec<String> {
        let (name, image) = (self.node.name(), &self.assets.image);
        let mut args = Args(self.assets.emulator.argv());
        args.add(&["-name", &name, "-machine", "q35"]);
        args.add(&self.assets.accelerator.args());
        args.add(&["-m", &self.options.node_memory_mib.to_string()]);
        args.add(&["-nodefaults", "-display", "none"]);
        args.add(&["-kernel", &show(&image.kernel())]);
        args.add(&["-initrd", &show(&image.initrd()), "-append", KERNEL_ARGS]);
        let console = self.lab.logs().join(format!("{name}-console.log"));
        args.add(&["-serial", &format!("file:{}", show(&console))]);
        let monitor = show(&self.dir.join(MONITOR));
        args.add(&["-qmp", &format!("unix:{monitor},server=on,wait=off")]);
        args.device("virtio-rng-pci");
        self.add_watchdog(&mut args);
        self.add_disks(&mut args);
        self.add_audit(&mut args);
        self.add_cables(&mut args);
        self.add_ports(&mut args);
        args.0
    }

    fn add_watchdog(&self, args: &mut Args) {
        match self.options.watchdog {
            // After a watchdog reset the node boots again.
            Watchdog::Board => {
                args.device("i6300esb");
                args.add(&["-action", "watchdog=reset"]);
            }
            Watchdog::Bmc => {
                let socket = show(&self.dir.join(BMC_SOCKET));
                // Reconnecting also puts the first connection off until the devices are there: QEMU 7.2 crashes
                // when its controller answers earlier.
                args.add(&[
                    "-chardev",
                    &format!("socket,id=bmc,path={socket},reconnect=1"),
                ]);
                args.device("ipmi-bmc-extern,id=bmc0,chardev=bmc");
                args.device("isa-ipmi-kcs,bmc=bmc0");
            }
        }
    }

    fn add_disks(&self, args: &mut Args) {
        for (serial, path, options) in self.own_disks() {
            let file = show(&path);
            args.add(&[
                "-drive",
                &format!("if=none,id={serial},file={file},{options}"),
            ]);
            args.device(&format!("virtio-blk-pci,drive={serial},serial={serial}"));
        }
        args.add(&["-drive", &shared_drive(&self.lab.shared_disk())]);
        args.device(&format!("pcie-root-port,id={DISK_BUS},chassis=1"));
        args.device(&format!(
            "virtio-blk-pci,id={DISK_DEVICE},bus={DISK_BUS},drive={SHARED_DISK},\
             serial={SHARED_DISK},share-rw=on"
        ));
    }

    /// See [`crate::audit`].
    fn add_audit(&self, args: &mut Args) {
        // QEMU puts its process id in the place of %d: each power-on has a trace of its own.
        let trace = audit::dir(self.lab.logs()).join(format!("{}.%d", self.node.name()));
        args.add(&["-D", &show(&trace), "-msg", "timestamp=on"]);
        for event in audit::EVENTS {
            args.add(&["-trace", &format!("enable={event}")]);
        }
    }

    fn add_cables(&self, args: &mut Args) {
        for (number, bridge) in [(0, MGMT_BRIDGE), (1, VM_BRIDGE)] {
            let port = Hub::port(bridge, self.node);
            let netdev = format!("tap,id={port},ifname={port},script=no,downscript=no");
            args.add(&["-netdev", &netdev]);
            let mac = self.node.mac(number);
            args.device(&format!("virtio-net-pci,netdev={port},mac={mac},romfile="));
        }
    }

    fn add_ports(&self, args: &mut Args) {
        args.device("virtio-serial-pci");
        let socket = show(&self.dir.join("conf").join(CONTROL));
        let chardev = format!("socket,id={CONTROL},path={socket},server=on,wait=off");
        args.add(&["-chardev", &chardev]);
        args.device(&format!("virtserialport,chardev={CONTROL},name={CONTROL}"));
        let san = self.options.san.then_some(&san::SERVICE);
        for service in SERVICES.iter().chain(san) {
            let log = self
                .lab
                .logs()
                .join(format!("{}-{service}.log", self.node.name()));
            let chardev = format!("file,id={service},path={},append=on", show(&log));
            args.add(&["-chardev", &chardev]);
            args.device(&format!("virtserialport,chardev={service},name={service}"));
        }
    }

    /// The disks that no other machine writes. The host does not crash with the node, so its page cache may hold them.
    fn own_disks(&self) -> [(&'static str, PathBuf, &'static str); 3] {
        let read_only = "format=raw,readonly=on,file.locking=off";
        [
            (
                "root",
                self.dir.join("root.qcow2"),
                "format=qcow2,cache=unsafe",
            ),
            ("bin", self.lab.paths().disks().join("bin.img"), read_only),
            ("conf", self.dir.join("conf.img"), read_only),
        ]
    }
}

/// Tests, once per boot of the host, whether a node boots quickly on the host's KVM and has nested virtualization;
/// the CPU model does not tell.
fn find_accelerator(image: &NodeImage, emulator: &Emulator) -> Result<Accelerator> {
    let known = cache_dir()?.join(format!("accelerator-{}", boot_id()?));
    let nested = match fs::read_to_string(&known) {
        Ok(word) => word == "kvm",
        Err(_) => {
            let nested = step("trying hardware virtualization for the nodes", || {
                probe_kvm(image, emulator)
            })?;
            fs::write(&known, if nested { "kvm" } else { "tcg" }).context("remember the result")?;
            nested
        }
    };
    Ok(if nested {
        Accelerator::Kvm
    } else {
        Accelerator::Emulation
    })
}

fn probe_kvm(image: &NodeImage, emulator: &Emulator) -> Result<bool> {
    if !Path::new("/dev/kvm").exists() {
        return Ok(false);
    }
    let argv = emulator.argv();
    let (program, first) = argv.split_first().context("no program")?;
    let run = Run::new(program)
        .args(first)
        .args(Accelerator::Kvm.args())
        .args([
            "-machine",
            "q35",
            "-m",
            "512",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args([
            "-serial",
            "stdio",
            "-append",
            "console=ttyS0 quiet panic=-1 lab.probe",
            "-kernel",
        ])
        .arg(image.kernel())
        .arg("-initrd")
        .arg(image.initrd())
        .deadline(KVM_PROBE_DEADLINE);
    // A timeout and a refusal by KVM both mean that nesting does not work.
    Ok(run
        .text()
        .is_ok_and(|console| console.contains("lab-probe: nested")))
}

fn link_or_copy(from: &Path, to: &Path) -> Result<()> {
    if fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    fs::copy(from, to)
        .map(drop)
        .with_context(|| format!("copy {}", from.display()))
}

fn tree_bytes(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let entry = entry.context("list a directory")?;
        let metadata = entry.metadata().context("stat a file")?;
        bytes += if metadata.is_dir() {
            tree_bytes(&entry.path())?
        } else {
            metadata.len()
        };
    }
    ensure!(bytes > 0, "{} is empty", dir.display());
    Ok(bytes)
}

/// Where a node has the disk of programs.
const BIN: &str = "/opt/lab";
/// Socket of a node's management controller.
const BMC_SOCKET: &str = "bmc";
/// Socket of a machine's monitor, in the node's directory.
pub(crate) const MONITOR: &str = "qmp";
/// File of a node's QEMU command line.
const COMMAND_LINE: &str = "qemu.json";
/// What a node runs from the disk of programs.
const PROGRAMS: &[&str] = &[
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "kubelet",
    "kube-proxy",
];
/// Services with a log port of their own, as the SAN's initiator has where there is one.
const SERVICES: &[&str] = &["containerd", "kubelet", "kube-proxy"];
/// A panic resets the node after 1 s. CPU mitigations are off: they slow emulation and serve no purpose in a lab.
/// Timers expire at ticks: programming the local APIC for each takes an emulated node more time than its idle
/// services do, and Go programs sleep for some 20 µs often.
const KERNEL_ARGS: &str =
    "console=ttyS0 panic=1 mitigations=off net.ifnames=0 no_timer_check highres=off nowatchdog";
/// 3 s with working nested virtualization; a machine without it does not finish.
const KVM_PROBE_DEADLINE: Duration = Duration::from_secs(15);
