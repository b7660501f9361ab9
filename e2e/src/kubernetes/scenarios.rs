//! Scenarios that every tier runs: the same story on native nodes with the probe guest and on
//! emulated ones with a Debian guest.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bascule_lab::Component;
use jiff::Timestamp;

use super::{ClusterVm, Installation, Moved, Takeover, Writer};
use crate::FlowSummary;

/// What a drain cost, as administrator and clients saw it.
#[derive(Clone, Debug)]
pub struct Drained {
    /// How long `kubectl drain` took.
    pub took: Duration,
    /// What each guest went through, in the order that was asked for.
    pub guests: Vec<DrainedGuest>,
}

/// What a drain cost a guest.
#[derive(Clone, Debug)]
pub struct DrainedGuest {
    /// What became of its client's packets.
    pub seen: FlowSummary,
    /// What the VirtualMachineMigration says.
    pub moved: Moved,
}

/// What a power cut cost.
#[derive(Clone, Debug)]
pub struct PowerCut {
    /// The node whose plug was pulled.
    pub from: String,
    /// The node that the guest runs on now.
    pub to: String,
    /// When the plug was pulled.
    pub plug: Timestamp,
    /// From then to the guest's answer.
    pub outage: Duration,
    /// The Failover's record.
    pub takeover: Takeover,
}

/// The chart is installed and the guest answers: what a user looks at shows both.
///
/// # Errors
/// When something is not as it should be; so in all scenarios.
pub fn install_and_first_vm(cluster: &Installation, vm: &ClusterVm<'_>) -> Result<()> {
    let mut talk = vm.talk()?;
    talk.ping()?;
    talk.append()?;
    talk.check()?;
    let overview = cluster.overview()?;
    for wanted in [
        format!("virtualmachine.bascule.dev/{}", vm.name),
        format!("sharedvolume.bascule.dev/{}", super::VOLUME),
    ] {
        ensure!(overview.contains(&wanted), "no {wanted} in:\n{overview}");
    }
    Ok(())
}

/// `kubectl drain` moves all guests of a node live: the sessions of before go on, and drain exits
/// with 0.
///
/// # Errors
/// As [`install_and_first_vm`].
pub fn drain_moves_vms_live(
    cluster: &Installation,
    source: &str,
    vms: &[&ClusterVm<'_>],
) -> Result<Drained> {
    let mut clients = Vec::new();
    for vm in vms {
        ensure!(vm.node()? == source, "{} is not on {source}", vm.name);
        let mut talk = vm.talk()?;
        talk.ping()?;
        clients.push((vm, talk, vm.flow()?));
    }
    let took = cluster.drain(source)?;
    let mut guests = Vec::new();
    for (vm, mut talk, flow) in clients {
        let target = vm.wait_elsewhere(source, SETTLED_LIMIT)?;
        let seen = flow.finish()?;
        talk.ping()?;
        talk.check()?;
        let moves = vm.moves()?;
        let moved = moves.last().cloned().context("no record of the move")?;
        let how = (moved.mode.as_str(), moved.phase.as_str());
        ensure!(how == ("Live", "Succeeded"), "{moves:?}");
        let way = (moved.source.as_str(), moved.target.as_str());
        ensure!(way == (source, target.as_str()), "{moved:?}");
        guests.push(DrainedGuest { seen, moved });
    }
    cluster.uncordon(source)?;
    Ok(Drained { took, guests })
}

/// The plug of the guest's node is pulled: it starts elsewhere, not before the safe time, and has
/// everything that it promised. The node stays off.
///
/// # Errors
/// As [`install_and_first_vm`].
pub fn power_cut(cluster: &Installation, vm: &ClusterVm<'_>) -> Result<PowerCut> {
    let writer = vm.writer()?;
    let from = vm.node()?;
    let (plug, begin) = (Timestamp::now(), Instant::now());
    cluster.lab().node(&from)?.cut()?;
    let (to, takeover) = restarted_elsewhere(vm, &from, writer)?;
    let outage = begin.elapsed();
    // By the coordinator's clock, which alone counts, and by the host's as far as the two agree.
    let (silent, required) = takeover.silence()?;
    ensure!(required >= SAFE_TIME && silent >= required, "{takeover:?}");
    let after = Duration::try_from(takeover.taken_over - plug).unwrap_or_default();
    ensure!(
        after + RENEWAL + CLOCKS_DIFFER_MAX >= SAFE_TIME,
        "taken over {after:?} after the power cut"
    );
    Ok(PowerCut {
        from,
        to,
        plug,
        outage,
        takeover,
    })
}

/// The guest of a lost node answers elsewhere with everything that it had promised, and its record
/// says why that was safe. Returns the new node and the record.
///
/// # Errors
/// As [`install_and_first_vm`].
pub fn restarted_elsewhere(
    vm: &ClusterVm<'_>,
    from: &str,
    writer: Writer,
) -> Result<(String, Takeover)> {
    let to = vm.wait_elsewhere(from, RESTART_LIMIT)?;
    let mut after = vm.talk()?;
    let found = after.check()?;
    after.append()?;
    let promised = writer.finish()?;
    ensure!(
        found >= promised,
        "{promised} records were flushed, {found} are there"
    );
    let takeover = vm.takeover()?;
    ensure!(takeover.proof == "SafeTimeElapsed", "{takeover:?}");
    Ok((to, takeover))
}

/// Two quick migrations: the session of before goes on after each.
///
/// # Errors
/// As [`install_and_first_vm`].
pub fn quick_migration_round_trip(vm: &ClusterVm<'_>) -> Result<()> {
    let mut talk = vm.talk()?;
    talk.append()?;
    let home = vm.node()?;
    for target in [None, Some(home.as_str())] {
        let moved = vm.migrate("Quick", target)?;
        ensure!(moved.mode == "Quick", "{moved:?}");
        talk.ping()?;
        talk.append()?;
        talk.check()?;
    }
    ensure!(vm.node()? == home, "it is not back on {home}");
    Ok(())
}

/// Without daemons, operators and API server the guest runs on; when they are back, it can be moved.
///
/// # Errors
/// As [`install_and_first_vm`].
pub fn killing_daemon_operator_apiserver_stops_no_guest(
    cluster: &Installation,
    vm: &ClusterVm<'_>,
) -> Result<()> {
    let mut talk = vm.talk()?;
    let lab = cluster.lab();
    let tenure = vm.tenure()?;
    let daemons = cluster.kill_pods("node")?;
    let operators = cluster.kill_pods("operator")?;
    lab.kill(Component::Apiserver)?;
    let begin = Instant::now();
    while begin.elapsed() < WITHOUT_ANYBODY {
        talk.ping()?;
        talk.append()?;
    }
    lab.restart(Component::Apiserver)?;
    talk.ping()?;
    talk.check()?;
    // The VirtualMachine's status is one of before until an operator is back.
    cluster.wait_replaced("node", &daemons)?;
    cluster.wait_replaced("operator", &operators)?;
    vm.wait_ready(BACK_LIMIT)?;
    ensure!(vm.tenure()? == tenure, "it changed hands meanwhile");
    // The daemons that came back know the guest.
    let moved = vm.migrate("Live", None)?;
    ensure!(moved.source != moved.target, "{moved:?}");
    talk.ping()
}

/// An operator that has just moved a guest reports it within seconds.
const SETTLED_LIMIT: Duration = Duration::from_secs(120);
/// Longer than a volume's lease: the heartbeat goes on without any of them.
const WITHOUT_ANYBODY: Duration = Duration::from_secs(10);
/// An emulated node starts its daemon's container again within a minute.
const BACK_LIMIT: Duration = Duration::from_secs(240);
/// From the loss of a node to its guest answering elsewhere, on a machine that is busy besides.
const RESTART_LIMIT: Duration = Duration::from_secs(420);
/// T_safe of a SharedVolume with the default times.
pub const SAFE_TIME: Duration = Duration::from_secs(27);
/// The last sign of life may be this much older than the power cut.
const RENEWAL: Duration = Duration::from_secs(1);
/// The API's times are whole seconds, rounded down, and an emulated node sets its clock at boot by one
/// that shows whole seconds.
const CLOCKS_DIFFER_MAX: Duration = Duration::from_secs(2);
