//! `bascule-node volume`: the operator's work on SharedVolumes as commands, for use without Kubernetes.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use anyhow::{Result, bail};
use bascule_ipc::volume::FencingMode;
use bascule_node_api::HostPort;
use bascule_node_api::command::{Backing, Command, FormatOptions, Outcome};
use bascule_types::{AdminConfirmation, Bytes, Change, Generation, Owner, SlotId};

use super::interrupt::Interrupt;
use super::local_node::{attach, granted, own_slot, rows, supervisor};
use super::peer::Peer;
use crate::config::NodeConfig;
use crate::output::show;

/// `bascule-node volume`
#[derive(Debug, clap::Subcommand)]
pub(crate) enum VolumeCommand {
    /// Format a blank device or file as a volume; this node gets its first slot
    Format(FormatArgs),
    /// Attach a volume on this node, and give the node a slot on it
    Join(VolumeJoinArgs),
    /// List a volume's disks, kept disks included
    Disks(NamedArgs),
    /// List a volume's virtual machines with the slot and generation that owns each, and the epoch
    Vms(NamedArgs),
    /// Confirm that a node is dead and that none of its processes runs any more. A wrong
    /// confirmation destroys data
    ConfirmFenced(ConfirmArgs),
}

/// `bascule-node volume format`
#[derive(Debug, clap::Args)]
pub(crate) struct FormatArgs {
    #[command(flatten)]
    config: NodeConfig,
    /// The device, or a file
    path: PathBuf,
    /// Create the file first, with this size
    #[arg(long, value_name = "BYTES")]
    create_size: Option<u64>,
    /// The proof that an unreachable node writes no more: its hardware watchdog, or only a manual
    /// fencing confirmation
    #[arg(long, value_parser = ["watchdog", "lease-only"], default_value = "lease-only")]
    fencing: String,
}

/// `bascule-node volume join`
#[derive(Debug, clap::Args)]
pub(crate) struct VolumeJoinArgs {
    #[command(flatten)]
    config: NodeConfig,
    /// The volume's name, as documents use it
    name: String,
    /// The device or file that holds the volume
    backing: PathBuf,
    /// A node that has joined the volume already, host:port (an IPv6 address in
    /// brackets); not needed on the node that formatted it
    #[arg(long, value_name = "HOST:PORT")]
    via: Option<HostPort>,
    /// The address at which other nodes reach this node
    #[arg(long, env = "BASCULE_ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    address: IpAddr,
    /// Create no cgroups (for use without root)
    #[arg(long)]
    no_cgroups: bool,
}

/// The arguments of the commands that take only a volume's name.
#[derive(Debug, clap::Args)]
pub(crate) struct NamedArgs {
    #[command(flatten)]
    config: NodeConfig,
    /// The volume's name
    name: String,
}

/// `bascule-node volume confirm-fenced`
#[derive(Debug, clap::Args)]
pub(crate) struct ConfirmArgs {
    #[command(flatten)]
    config: NodeConfig,
    /// The volume's name
    name: String,
    /// The dead node's slot, as `volume vms` shows it
    #[arg(long)]
    slot: u16,
    /// The dead node's generation, as `volume vms` shows it
    #[arg(long)]
    generation: u64,
    /// I have made sure that the node is switched off, or that its access to the device is cut
    #[arg(long, required = true)]
    nothing_of_it_runs: bool,
}

/// Runs `bascule-node volume`.
pub(crate) fn run(command: &VolumeCommand) -> Result<()> {
    match command {
        VolumeCommand::Format(args) => format(args),
        VolumeCommand::Join(args) => join(args),
        VolumeCommand::Disks(args) => disks(args),
        VolumeCommand::Vms(args) => list_vms(args),
        VolumeCommand::ConfirmFenced(args) => confirm(args),
    }
}

fn format(args: &FormatArgs) -> Result<()> {
    let node = supervisor(&args.config, IpAddr::V4(Ipv4Addr::LOCALHOST), true)?;
    let path = std::path::absolute(&args.path)?;
    let is_device = !path.is_file() && path.exists();
    let backing = if is_device {
        Backing::Device { path }
    } else {
        Backing::File {
            path,
            size: args.create_size.map(Bytes),
        }
    };
    let fencing = match args.fencing.as_str() {
        "watchdog" => FencingMode::Watchdog,
        _ => FencingMode::LeaseOnly,
    };
    let options = FormatOptions::new(fencing);
    match node.format_volume(&backing, node.identity.cluster, &options)? {
        Outcome::Formatted { volume } => show(&format!("Formatted volume {volume}.\n")),
        other => bail!("format answered {other:?}"),
    }
}

fn join(args: &VolumeJoinArgs) -> Result<()> {
    let node = supervisor(&args.config, args.address, args.no_cgroups)?;
    if let Some(via) = &args.via {
        let mut peer = Peer::connect(via, &node.paths.tls())?;
        let change = Change::RegisterNode {
            node: node.identity.node,
        };
        peer.execute(&Command::Change {
            volume: args.name.clone(),
            change,
        })?;
    }
    attach(&node, &args.name, Some(&args.backing))?;
    let owner = own_slot(&node, &args.name, &Interrupt::default())?;
    show(&format!("Joined volume {} as {owner}.\n", args.name))
}

fn disks(args: &NamedArgs) -> Result<()> {
    let node = supervisor(&args.config, IpAddr::V4(Ipv4Addr::LOCALHOST), true)?;
    let mut table = format!("{:<48} {:>16} {:<8} VM\n", "DISK", "BYTES", "STATE");
    for disk in rows(&node, &args.name)?.disks {
        let state = match (disk.importing, disk.vm) {
            (true, _) => "filling",
            (false, Some(_)) => "used",
            (false, None) => "kept",
        };
        let vm = disk.vm.map(|vm| vm.to_string()).unwrap_or_default();
        writeln!(
            table,
            "{:<48} {:>16} {state:<8} {vm}",
            disk.name.as_str(),
            disk.size.0
        )?;
    }
    show(&table)
}

fn list_vms(args: &NamedArgs) -> Result<()> {
    let node = supervisor(&args.config, IpAddr::V4(Ipv4Addr::LOCALHOST), true)?;
    let mut table = format!("{:<48} {:>8} OWNER\n", "VM", "EPOCH");
    for row in rows(&node, &args.name)?.vms {
        let owner = row
            .owner
            .map_or_else(|| "none".to_owned(), |owner| owner.to_string());
        writeln!(table, "{:<48} {:>8} {owner}", row.name.as_str(), row.epoch)?;
    }
    show(&table)
}

fn confirm(args: &ConfirmArgs) -> Result<()> {
    let node = supervisor(&args.config, IpAddr::V4(Ipv4Addr::LOCALHOST), true)?;
    let victim = Owner {
        slot: SlotId(args.slot),
        generation: Generation(args.generation),
    };
    let change = Change::ConfirmFenced {
        victim,
        confirmation: AdminConfirmation::Confirmed,
    };
    let answer = granted(node.change(&args.name, change))?;
    show(&format!(
        "Recorded: {answer:?}. The node's VMs can be started elsewhere now.\n"
    ))
}
