//! The command line.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};

use crate::control_plane::Component;
use crate::faults::{self, Network, parse_side};

use crate::down::{down, down_all};
use crate::lab::Lab;
use crate::names::{HUB_VM_ADDRESS, LabName};
use crate::node::Service;
use crate::options::{Options, Watchdog};
use crate::progress::say;
use crate::state::{LabPaths, State, Tier};
use crate::up::prepare;
use crate::{bmc, guard, init, process, project, san, web};

/// Real Kubernetes clusters on one machine, with fault injection.
///
/// A lab has a control plane (etcd, API server, controller manager, scheduler, DNS), nodes with
/// containerd, kubelet and kube-proxy, two networks (fd00:90::/64 for the cluster, 10.90.0.0/24 in the emulated tier; 10.91.0.0/24 for virtual machines,
/// on the bridge vmbr0 of every node) and a disk that all nodes share (/dev/disk/by-id/virtio-shared0). It changes
/// neither the host's network nor its disks; `lab down` removes everything but the logs.
#[derive(Debug, Parser)]
#[command(name = "lab", version, max_term_width = 100)]
struct Cli {
    /// Name of the lab. Labs with different names are independent.
    #[arg(long, global = true, default_value = "lab", env = "BASCULE_LAB")]
    lab: LabName,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Bring a lab up. Missing tools are installed and built first (about 20 min on 2 cores, once).
    Up(Up),
    /// Take the lab down and remove everything but its logs, also after a killed run.
    Down {
        /// All labs of this user.
        #[arg(long)]
        all: bool,
    },
    /// Show the lab: nodes, components, partitions, where the logs are.
    Status,
    /// Install and build everything that a lab needs, without starting one.
    Prepare {
        /// Prepare the emulated tier as well.
        #[arg(long)]
        emulated: bool,
    },
    /// Make the lab's guest (a Debian kernel and an initramfs) and print where its files are.
    Guest,
    /// Run kubectl as cluster administrator.
    Kubectl(Passthrough),
    /// Run helm as cluster administrator.
    Helm(Passthrough),
    /// Install this checkout's chart with helm. Needs a lab that was brought up with `--image`.
    Install {
        /// More arguments for helm, such as `--set operator.replicas=1`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        helm: Vec<String>,
    },
    /// Run a program in the hub's network, which reaches the API, nodes, pods and virtual machines.
    Run(Passthrough),
    /// Run a program on a node. Does not use the node's network, so it works during partitions.
    Exec {
        /// Node name, such as n1.
        node: String,
        #[command(flatten)]
        command: Passthrough,
    },
    /// Cut a node's power.
    Cut {
        /// Node name, such as n1.
        node: String,
    },
    /// Power a node on again.
    Boot {
        /// Node name, such as n1.
        node: String,
    },
    /// Freeze a node: no process on it runs until `lab thaw`.
    Freeze {
        /// Node name, such as n1.
        node: String,
    },
    /// Thaw a frozen node.
    Thaw {
        /// Node name, such as n1.
        node: String,
    },
    /// Cut the network between two machines, in one direction.
    Partition {
        /// Sender: a node, or `hub` for the control plane.
        from: String,
        /// Receiver: a node, or `hub`.
        to: String,
        /// The network to cut.
        #[arg(long, value_enum, default_value = "management")]
        network: Network,
        /// Cut the other direction as well.
        #[arg(long)]
        both: bool,
    },
    /// Isolate a node from all others and the control plane on the management network; its virtual machines stay
    /// reachable.
    Isolate {
        /// Node name, such as n1.
        node: String,
    },
    /// End all partitions.
    Heal,
    /// Break a node's path to the shared disk (emulated tier).
    Disk {
        /// Node name, such as n1.
        node: String,
        /// What to do with the path to the disk.
        #[arg(value_enum)]
        action: DiskAction,
    },
    /// Kill, stop or start a service of a node.
    Service {
        /// Node name, such as n1.
        node: String,
        /// The service to act on.
        #[arg(value_enum)]
        service: Service,
        /// `kill`: it is restarted at once; `stop`: it stays down.
        #[arg(value_enum)]
        action: ServiceAction,
    },
    /// Kill or start a component of the control plane.
    Component {
        /// The component to act on.
        #[arg(value_enum)]
        component: Component,
        /// `kill`: it stays down until `start`.
        #[arg(value_enum)]
        action: ComponentAction,
    },
    /// Publish a file on the lab's web server and print its URL and SHA-256.
    Publish {
        /// The file to publish.
        file: PathBuf,
        /// File name in the URL.
        #[arg(long)]
        name: String,
    },
    /// Publish the lab's guest, a Debian kernel and an initramfs, and print their URLs and SHA-256.
    PublishGuest,
    /// Print the ends of all logs.
    Logs,
    /// Build Bascule's container image, from a directory of static programs.
    Image {
        /// Directory of the programs; files that are not Bascule's are left out.
        #[arg(long)]
        bin_dir: PathBuf,
        /// Name and tag.
        #[arg(long, default_value = crate::image::BASCULE_IMAGE)]
        name: String,
        /// The archive to write.
        #[arg(long)]
        out: PathBuf,
    },
    #[command(hide = true)]
    Launch {
        #[arg(long)]
        cgroup: String,
        #[arg(long)]
        netns: Option<String>,
        #[arg(last = true)]
        argv: Vec<String>,
    },
    #[command(hide = true)]
    NodeInit {
        #[arg(long)]
        spec: PathBuf,
    },
    #[command(hide = true)]
    Serve {
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        address: String,
    },
    #[command(hide = true)]
    Bmc {
        #[arg(long)]
        node: String,
        #[arg(long)]
        socket: PathBuf,
    },
    #[command(hide = true)]
    San {
        #[arg(long)]
        disk: PathBuf,
        #[arg(long)]
        hold: PathBuf,
        #[arg(long)]
        writes: PathBuf,
    },
    #[command(hide = true)]
    Guard {
        #[arg(long)]
        process: i32,
    },
}

#[derive(Debug, Args)]
struct Up {
    /// Kind of the nodes.
    #[arg(long, value_enum, default_value = "native")]
    tier: Tier,
    /// Number of nodes, 1 to 50.
    #[arg(long, default_value_t = 2)]
    nodes: u8,
    /// Image archive (see `lab image`) to import on every node; may be repeated.
    #[arg(long)]
    image: Vec<PathBuf>,
    /// Memory of an emulated node, MiB.
    #[arg(long)]
    node_memory: Option<u32>,
    /// The watchdog of an emulated node.
    #[arg(long, value_enum, default_value = "bmc")]
    watchdog: Watchdog,
    /// Connect the emulated nodes to an iSCSI SAN with two paths.
    #[arg(long)]
    san: bool,
}

#[derive(Debug, Args)]
struct Passthrough {
    /// Program arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    args: Vec<String>,
}

impl Passthrough {
    fn words(&self) -> Vec<&str> {
        self.args.iter().map(String::as_str).collect()
    }
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum ServiceAction {
    Kill,
    Stop,
    Start,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum DiskAction {
    /// Requests wait until `resume`.
    Stall,
    /// End `stall`.
    Resume,
    /// Hot-unplug the device; requests fail.
    Remove,
    /// Hot-plug the device again.
    Return,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum ComponentAction {
    Kill,
    Start,
    Freeze,
    Thaw,
}

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    match perform(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(cli: &Cli) -> Result<()> {
    match &cli.command {
        Command::Up(up) => bring_up(&cli.lab, up),
        Command::Down { all: false } => down(&cli.lab),
        Command::Down { all: true } => down_all().map(drop),
        Command::Status => status(&cli.lab),
        Command::Guest => {
            let image = crate::guest::GuestImage::ensure()?;
            let (kernel, initrd) = (image.kernel.display(), image.initrd.display());
            show(&format!("{kernel}\n{initrd}\n"))
        }
        Command::Prepare { emulated: false } => prepare(Tier::Native),
        Command::Prepare { emulated: true } => prepare(Tier::Emulated),
        Command::Image { bin_dir, name, out } => {
            let digest = project::pack(name, bin_dir, out)?;
            show(&format!("{digest}\n"))
        }
        Command::Launch {
            cgroup,
            netns,
            argv,
        } => process::launch(cgroup, netns.as_deref(), argv),
        Command::NodeInit { spec } => init::run(spec),
        Command::Serve { dir, address } => web::serve(dir, address),
        Command::Bmc { node, socket } => bmc::serve(&cli.lab, node, socket),
        Command::San { disk, hold, writes } => san::serve(disk, hold, writes),
        Command::Guard { process } => guard::guard(&cli.lab, *process),
        command => in_lab(&Lab::open(&cli.lab)?, command),
    }
}

/// Commands that need a lab that is up.
fn in_lab(lab: &Lab, command: &Command) -> Result<()> {
    match command {
        Command::Kubectl(args) => Err(lab.kubectl_run()?.args(&args.args).replace_self()),
        Command::Helm(args) => Err(lab.helm_run()?.args(&args.args).replace_self()),
        Command::Run(args) => {
            let (program, args) = args.args.split_first().context("no program")?;
            Err(lab.hub().run(program).args(args).replace_self())
        }
        Command::Install { helm } => {
            lab.install_bascule(&helm.iter().map(String::as_str).collect::<Vec<_>>())
        }
        Command::Exec { node, command } => show(&lab.node(node)?.exec(&command.words())?),
        Command::Publish { file, name } => show_source("file", &lab.publish(name, file)?),
        Command::PublishGuest => {
            let sources = lab.publish_guest()?;
            show_source("kernel", &sources.kernel)?;
            show_source("initrd", &sources.initrd)
        }
        Command::Logs => {
            lab.print_logs();
            Ok(())
        }
        fault => inject_fault(lab, fault),
    }
}

/// Commands that inject or end a fault.
fn inject_fault(lab: &Lab, command: &Command) -> Result<()> {
    match command {
        Command::Cut { node } => lab.node(node)?.cut(),
        Command::Boot { node } => lab.node(node)?.boot(),
        Command::Freeze { node } => lab.node(node)?.freeze(),
        Command::Thaw { node } => lab.node(node)?.thaw(),
        Command::Partition {
            from,
            to,
            network,
            both,
        } => {
            let (from, to) = (parse_side(lab, from)?, parse_side(lab, to)?);
            lab.partition(*network, from, to)?;
            if *both {
                lab.partition(*network, to, from)
            } else {
                Ok(())
            }
        }
        Command::Isolate { node } => lab.isolate(lab.node(node)?.index()),
        Command::Heal => lab.heal(),
        Command::Disk { node, action } => {
            let node = lab.node(node)?;
            match action {
                DiskAction::Stall => node.stall_disk(),
                DiskAction::Resume => node.resume_disk(),
                DiskAction::Remove => node.remove_disk(),
                DiskAction::Return => node.return_disk(),
            }
        }
        Command::Service {
            node,
            service,
            action,
        } => {
            let node = lab.node(node)?;
            match action {
                ServiceAction::Kill => node.kill_service(*service),
                ServiceAction::Stop => node.stop_service(*service),
                ServiceAction::Start => node.start_service(*service),
            }
        }
        Command::Component { component, action } => match action {
            ComponentAction::Kill => lab.kill(*component),
            ComponentAction::Start => lab.restart(*component),
            ComponentAction::Freeze => lab.freeze(*component, true),
            ComponentAction::Thaw => lab.freeze(*component, false),
        },
        other => bail!("{other:?} is not a fault"),
    }
}

fn bring_up(name: &LabName, up: &Up) -> Result<()> {
    let mut options = Options::new(name.clone(), up.tier, up.nodes);
    options.images.clone_from(&up.image);
    options.watchdog = up.watchdog;
    options.san = up.san;
    if let Some(memory) = up.node_memory {
        options.node_memory_mib = memory;
    }
    let lab = Lab::up(&options)?;
    say(&format!("logs: {}", lab.logs().display()));
    say("next: `lab kubectl get nodes -o wide`");
    Ok(())
}

fn status(name: &LabName) -> Result<()> {
    let paths = LabPaths::new(name)?;
    let Some(state) = State::load(&paths)? else {
        return show(&format!("lab {name}: down\n"));
    };
    let mut text = String::new();
    let how = if state.complete { "up" } else { "incomplete" };
    writeln!(
        text,
        "lab {name}: {how}, {:?} tier, logs in {}",
        state.tier,
        state.logs.display()
    )?;
    let network = "virtual machines on 10.91.0.0/24, the hub is";
    writeln!(text, "network: {network} {HUB_VM_ADDRESS}")?;
    if !state.complete {
        return show(&text);
    }
    let lab = Lab::open(name)?;
    for component in Component::ALL {
        let running = if lab.running(component)? {
            "running"
        } else {
            "down"
        };
        writeln!(text, "{:<24} {running}", component.program())?;
    }
    for node in lab.nodes() {
        let Some(machine) = node.machine()?.filter(|machine| machine.alive()) else {
            writeln!(text, "{:<24} off", node.name())?;
            continue;
        };
        writeln!(text, "{:<24} on, process {}", node.name(), machine.pid())?;
        match node.services() {
            Ok(services) => {
                for (service, pid) in services {
                    let pid = pid.map_or_else(|| "down".to_owned(), |pid| format!("pid {pid}"));
                    writeln!(text, "  {service:<22} {pid}")?;
                }
            }
            Err(error) => writeln!(text, "  does not respond: {error:#}")?,
        }
    }
    text += &faults::describe(name);
    show(&text)
}

/// Writes to standard output. A reader that has gone (`| head`) is no error.
fn show(text: &str) -> Result<()> {
    show_to(&mut std::io::stdout().lock(), text)
}

fn show_to(out: &mut impl std::io::Write, text: &str) -> Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("write to standard output"),
    }
}

fn show_source(what: &str, source: &web::Source) -> Result<()> {
    let (url, sha256, bytes) = (&source.url, &source.sha256, source.bytes);
    show(&format!("{what}: {url} sha256={sha256} bytes={bytes}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `lab status | head` panicked.
    #[test]
    fn output_that_nobody_reads_is_no_error() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        drop(reader);
        show_to(&mut writer, "lab x: up\n").unwrap();
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
        show_to(&mut full.unwrap(), "lab x: up\n").unwrap_err();
    }
}
