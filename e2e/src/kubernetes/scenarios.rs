//! Scenarios of both tiers: on native nodes with the probe guest, on emulated nodes with a Debian
//! guest.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bascule_lab::Component;
use jiff::Timestamp;

use super::{ClusterVm, Installation, Moved, Takeover, Writer};
use crate::FlowSummary;

/// Figures of a drain, as an administrator and the guests' clients see it.
#[derive(Clone, Debug)]
pub struct Drained {
    /// How long `kubectl drain` took.
    pub took: Duration,
    /// Figures of each guest, in the order of the request.
    pub guests: Vec<DrainedGuest>,
}

/// Figures of one guest of a drain.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct DrainedGuest {
    /// Packets of a client during the drain.
    pub seen: FlowSummary,
    pub moved: Moved,
    /// When each stage of its move ended, after the begin of the drain. The times of Kubernetes are whole seconds.
    pub stages: Vec<(&'static str, Duration)>,
}

/// Figures of a power cut.
#[derive(Clone, Debug)]
pub struct PowerCut {
    /// The node whose power was cut.
    pub from: String,
    /// The node that the guest runs on now.
    pub to: String,
    /// When the power was cut, by the host's clock.
    pub cut_at: Timestamp,
    /// From the power cut to the guest's first response elsewhere.
    pub outage: Duration,
    /// The Failover's record.
    pub takeover: Takeover,
}

/// The chart is installed, the guest responds, and `kubectl get` shows both.
///
/// # Errors
/// When an expectation is not met; the same for all scenarios.
pub fn install_and_first_vm(cluster: &Installation, vm: &ClusterVm<'_>) -> Result<()> {
    let mut talk = vm.talk()?;
    talk.ping()?;
    talk.ensure_user_data(&vm.name)?;
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

/// `kubectl drain` moves all guests of a node live: open TCP sessions survive, and drain exits with
/// 0.
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
    let begun = Timestamp::now();
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
        let mut times = moved.times.clone();
        times.extend(vm.reservation_ready()?.map(|at| ("target's pod ready", at)));
        times.sort_by_key(|(_, at)| *at);
        let after = |at: Timestamp| Duration::try_from(at - begun).unwrap_or_default();
        let mut stages: Vec<_> = times
            .iter()
            .map(|(stage, at)| (*stage, after(*at)))
            .collect();
        stages.push(("drain ended", took));
        guests.push(DrainedGuest {
            seen,
            moved,
            stages,
        });
    }
    cluster.uncordon(source)?;
    Ok(Drained { took, guests })
}

/// The power of the guest's node is cut: the guest starts elsewhere, not before the safe time, with
/// every acknowledged record. The node stays off.
///
/// # Errors
/// As [`install_and_first_vm`].
pub fn power_cut(cluster: &Installation, vm: &ClusterVm<'_>) -> Result<PowerCut> {
    let writer = vm.writer()?;
    let from = vm.node()?;
    let (cut_at, begin) = (Timestamp::now(), Instant::now());
    cluster.lab().node(&from)?.cut()?;
    let (to, takeover) = restarted_elsewhere(vm, &from, writer)?;
    let outage = begin.elapsed();
    // By the coordinator's clock, which decides, and by the host's within the clocks' difference.
    let (elapsed, required) = takeover.time_without_heartbeat()?;
    ensure!(required >= SAFE_TIME && elapsed >= required, "{takeover:?}");
    let after = Duration::try_from(takeover.taken_over - cut_at).unwrap_or_default();
    ensure!(
        after + RENEWAL + CLOCKS_DIFFER_MAX >= SAFE_TIME,
        "taken over {after:?} after the power cut"
    );
    Ok(PowerCut {
        from,
        to,
        cut_at,
        outage,
        takeover,
    })
}

/// The guest of a lost node responds elsewhere with every acknowledged record, and its Failover has a
/// fence proof. Returns the new node and the Failover.
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
        "{promised} records were acknowledged, {found} are on the disk"
    );
    let takeover = vm.takeover()?;
    ensure!(takeover.proof == "SafeTimeElapsed", "{takeover:?}");
    Ok((to, takeover))
}

/// Two quick migrations, there and back: an open TCP session survives both.
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

/// The guest keeps running without node daemons, operators and API server; when they are back, it can
/// be migrated.
///
/// # Errors
/// As [`install_and_first_vm`].
pub fn killing_daemon_operator_apiserver_stops_no_guest(
    cluster: &Installation,
    vm: &ClusterVm<'_>,
) -> Result<()> {
    let mut talk = vm.talk()?;
    let lab = cluster.lab();
    let before = vm.slot_and_epoch()?;
    let daemons = cluster.kill_pods("node")?;
    let operators = cluster.kill_pods("operator")?;
    lab.kill(Component::Apiserver)?;
    let begin = Instant::now();
    while begin.elapsed() < CONTROL_PLANE_OUTAGE {
        talk.ping()?;
        talk.append()?;
    }
    lab.restart(Component::Apiserver)?;
    talk.ping()?;
    talk.check()?;
    // The VirtualMachine's status is stale until an operator is back.
    cluster.wait_replaced("node", &daemons)?;
    cluster.wait_replaced("operator", &operators)?;
    vm.wait_ready(BACK_LIMIT)?;
    ensure!(vm.slot_and_epoch()? == before, "another node took it over");
    // The restarted daemons have re-adopted the guest.
    let moved = vm.migrate("Live", None)?;
    ensure!(moved.source != moved.target, "{moved:?}");
    talk.ping()
}

/// An operator that has just moved a guest reports it within seconds.
const SETTLED_LIMIT: Duration = Duration::from_secs(120);
/// Longer than a volume's lease: the heartbeat must not depend on any of them.
const CONTROL_PLANE_OUTAGE: Duration = Duration::from_secs(10);
/// An emulated node starts its daemon's container again within a minute.
const BACK_LIMIT: Duration = Duration::from_secs(240);
/// From the loss of a node to its guest responding elsewhere, on a busy machine.
const RESTART_LIMIT: Duration = Duration::from_secs(420);
/// T_safe of a SharedVolume with the default times.
pub const SAFE_TIME: Duration = Duration::from_secs(27);
/// The last heartbeat may be this much older than the power cut.
const RENEWAL: Duration = Duration::from_secs(1);
/// The API's times are whole seconds, rounded down, and an emulated node sets its clock at boot by one
/// that shows whole seconds.
const CLOCKS_DIFFER_MAX: Duration = Duration::from_secs(2);
