//! `bascule-node migrate`: live migration of a VM of this node to another node.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bascule_ipc::vm::{MigrationLimits, MigrationPhase, MigrationStatus, Request, VmState};
use bascule_node_api::HostPort;
use bascule_node_api::command::{Command, Outcome, VmSpec};
use bascule_types::{AttemptId, Owner, VmUid};

use super::local_node::{find, forget, rows, supervisor, vm_row};
use super::peer::Peer;
use crate::config::NodeConfig;
use crate::output::{show, tell, tell_part};
use crate::processes::supervisor::Supervisor;
use crate::wait::wait_for;

/// `bascule-node migrate`
#[derive(Debug, clap::Args)]
pub(crate) struct MigrateArgs {
    #[command(flatten)]
    config: NodeConfig,
    /// The VM's name, or namespace/name
    name: String,
    /// The other node's API, host:port (its `bascule-node serve --standalone`); an IPv6 address in
    /// brackets
    #[arg(long, value_name = "HOST:PORT")]
    to: HostPort,
    /// The longest downtime of the guest, in milliseconds
    #[arg(long, default_value_t = MigrationLimits::default().downtime_ms_max)]
    downtime_ms: u64,
    /// The time limit of the migration, in seconds
    #[arg(long, default_value_t = 120)]
    timeout_s: u64,
    /// The bandwidth limit, in bytes per second
    #[arg(long)]
    bandwidth: Option<u64>,
}

/// Migrates the VM, showing the progress, and prints the result.
pub(crate) fn migrate(args: &MigrateArgs) -> Result<()> {
    let node = supervisor(&args.config, IpAddr::V4(Ipv4Addr::LOCALHOST), true)?;
    let vm = find(&node, &args.name)?;
    let spec = spec_of(&node, vm)?;
    let mut peer = Peer::connect(&args.to, &node.paths.tls())?;
    let to = slot_of(&mut peer, &spec.volume)?;
    let epoch = vm_row(&rows(&node, &spec.volume)?, vm)?.epoch;
    let attempt = AttemptId::random();
    let prepare = Command::PrepareIncoming {
        spec,
        attempt,
        owner: to,
        epoch,
    };
    let Outcome::Listening { address } = peer.execute(&prepare)? else {
        bail!("the other node did not answer with the address at which it listens");
    };
    let limits = MigrationLimits {
        downtime_ms_max: args.downtime_ms,
        total_ms_max: args.timeout_s * 1000,
        bytes_per_second_max: args.bandwidth,
    };
    // The command that shows the guest's console may remove the departed process, too.
    let watch = node.watch(vm)?;
    node.vm_request(
        vm,
        &Request::MigrateLive {
            attempt,
            peer: address,
            to,
            limits,
        },
    )?;
    let outcome = follow(
        &node,
        vm,
        attempt,
        Duration::from_secs(args.timeout_s) + GRACE,
    );
    if outcome.is_err() {
        forget_incoming(&mut peer, vm)?;
    }
    let (pid, status) = outcome?;
    drop(watch);
    forget(&node, vm, pid)?;
    say(&status, &args.to)
}

fn spec_of(node: &Supervisor, vm: VmUid) -> Result<VmSpec> {
    let path = node.paths.vm(vm).join("spec.json");
    let bytes = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("read {}", path.display()))
}

fn slot_of(peer: &mut Peer, volume: &str) -> Result<Owner> {
    let report = peer.report()?;
    if let Some(error) = report.kvm_error {
        bail!("no VM can run on {}: {error}", report.name);
    }
    let attached = report
        .volumes
        .iter()
        .find(|attached| attached.name == volume);
    match attached.map(|attached| &attached.status) {
        Some(Ok(status)) => status.owner.with_context(|| {
            format!(
                "{} has no slot on volume {volume}: `bascule-node volume join`",
                report.name
            )
        }),
        Some(Err(reason)) => bail!("volume {volume} is not usable on {}: {reason}", report.name),
        None => bail!("volume {volume} is not attached on {}", report.name),
    }
}

fn follow(
    node: &Supervisor,
    vm: VmUid,
    attempt: AttemptId,
    limit: Duration,
) -> Result<(u32, MigrationStatus)> {
    let progress = std::io::stderr().is_terminal();
    let ended = wait_for(limit, || {
        let status = node.vm_status(vm)?;
        let migration = status
            .migration
            .filter(|migration| migration.attempt == attempt)?;
        if progress {
            tell_part(format_args!(
                "\r{:?}: round {}, {} sent, {} to go   ",
                migration.phase, migration.rounds, migration.bytes, migration.remaining
            ));
        }
        let over = status.state == VmState::Departed
            || matches!(
                migration.phase,
                MigrationPhase::Cancelled | MigrationPhase::Failed | MigrationPhase::NotConverging
            );
        over.then_some((status.pid, migration))
    });
    if progress {
        tell("");
    }
    let (pid, migration) = ended.context("the migration does not end; the guest runs on")?;
    if migration.phase == MigrationPhase::Completed {
        return Ok((pid, migration));
    }
    let why = migration
        .failure
        .unwrap_or_else(|| format!("{:?}", migration.phase));
    bail!("the migration failed and the guest runs on here: {why}")
}

fn forget_incoming(peer: &mut Peer, vm: VmUid) -> Result<()> {
    let report = peer.report()?;
    if let Some(waiting) = report.vms.iter().find(|report| report.status.uid == vm) {
        peer.execute(&Command::CollectVm {
            vm,
            pid: waiting.status.pid,
        })?;
    }
    Ok(())
}

fn say(status: &MigrationStatus, to: &HostPort) -> Result<()> {
    let downtime = status
        .downtime_ms
        .map_or_else(|| "unknown".to_owned(), |ms| format!("{ms} ms"));
    let mut text = format!(
        "Moved to {to} in {} ms: {} rounds, {}, downtime {downtime}.\n",
        status.total_ms, status.rounds, status.bytes
    );
    for (phase, ms) in &status.timings {
        writeln!(text, "  {phase:?}: {ms} ms")?;
    }
    show(&text)
}

/// The time after the limit within which a VM process reports that the migration was given up.
const GRACE: Duration = Duration::from_secs(30);
