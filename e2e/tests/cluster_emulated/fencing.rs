//! Nodes that lose power or freeze and resume: never two writers.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, ensure};
use bascule_e2e::kubernetes::{ClusterVm, Installation, scenarios};
use bascule_lab::Node;
use jiff::Timestamp;

use crate::watchdog::{ensure_reset_between, wait_reset};
use crate::{BACK_LIMIT, CLUSTER};

#[test]
fn power_cut_restarts_vm_elsewhere_with_proof() {
    CLUSTER.with_resident("cut", |cluster, vm| {
        let since = SystemTime::now();
        let cut = scenarios::power_cut(cluster, vm).unwrap();
        println!("{cut:?}");
        vm.succession(since, &cut.from, &cut.to).unwrap();
        cluster.lab().node(&cut.from).unwrap().boot().unwrap();
        cluster.wait_back(&cut.from).unwrap();
    });
}

/// The whole machine is frozen; its watchdog outside keeps counting.
#[test]
fn frozen_node_never_writes_after_takeover() {
    CLUSTER.with_resident("frozen", |cluster, vm| {
        let for_a_while = |node: &Node<'_>| {
            node.freeze()?;
            std::thread::sleep(SHORT_FREEZE);
            node.thaw()
        };
        frozen_for_less_than_the_timeout(cluster, vm, for_a_while).unwrap();
        frozen_for_longer(cluster, vm, |node| node.freeze()).unwrap();
    });
}

/// Only bascule-volume and bascule-vm are stopped; the rest of the node runs, bascule-watchdog
/// included.
#[test]
fn frozen_node_never_writes_after_takeover_with_only_our_processes_frozen() {
    CLUSTER.with_resident("stopped", |cluster, vm| {
        let run = |node: &Node<'_>, script: &str| node.exec(&["sh", "-c", script]).map(drop);
        let stop = "pkill -STOP -x bascule-volume && pkill -STOP -x bascule-vm";
        let go_on = "pkill -CONT -x bascule-volume && pkill -CONT -x bascule-vm";
        // In one command: each command on a busy node may take seconds.
        let while_it_sleeps = format!("{stop} && sleep {} && {go_on}", SHORT_FREEZE.as_secs());
        let for_a_while = |node: &Node<'_>| run(node, &while_it_sleeps);
        frozen_for_less_than_the_timeout(cluster, vm, for_a_while).unwrap();
        frozen_for_longer(cluster, vm, |node| run(node, stop)).unwrap();
    });
}

/// The node resumes with an expired lease, checks its ownership, and has lost nothing.
fn frozen_for_less_than_the_timeout(
    cluster: &Installation,
    vm: &ClusterVm<'_>,
    freeze_for_a_while: impl Fn(&Node<'_>) -> Result<()>,
) -> Result<()> {
    let name = vm.node()?;
    let node = cluster.lab().node(&name)?;
    let resets = node.watchdog_resets()?;
    let (_, epoch) = vm.slot_and_epoch()?;
    let taken = vm.times_taken_over()?;
    let mut talk = vm.talk()?;
    let promised = talk.append()?;
    freeze_for_a_while(&node)?;
    talk.ping()?;
    ensure!(talk.append()? == promised + 1);
    talk.check()?;
    vm.wait_ready(BACK_LIMIT)?;
    ensure!(vm.node()? == name);
    ensure!(vm.slot_and_epoch()?.1 == epoch, "another node took it over");
    ensure!(vm.times_taken_over()? == taken);
    ensure!(node.watchdog_resets()? == resets);
    Ok(())
}

/// The watchdog resets the node before the guest starts elsewhere, and none of its writes lands after.
fn frozen_for_longer(
    cluster: &Installation,
    vm: &ClusterVm<'_>,
    freeze: impl Fn(&Node<'_>) -> Result<()>,
) -> Result<()> {
    let from = vm.node()?;
    let node = cluster.lab().node(&from)?;
    let resets = node.watchdog_resets()?.len();
    let since = SystemTime::now();
    let writer = vm.writer()?;
    let frozen = Instant::now();
    freeze(&node)?;
    let reset = wait_reset(&node, resets)?;
    println!("{from} was reset {:?} after the freeze", frozen.elapsed());
    let (to, takeover) = scenarios::restarted_elsewhere(vm, &from, writer)?;
    let succession = vm.succession(since, &from, &to)?;
    println!("{}; {succession:?}", takeover.detail);
    ensure_reset_between(reset, &succession)?;
    let reset = Timestamp::try_from(reset)?;
    // The API's times are whole seconds, rounded down.
    let taken_over = takeover.taken_over + Duration::from_secs(1);
    ensure!(reset < taken_over, "reset at {reset}, {takeover:?}");
    cluster.wait_back(&from)
}

/// The length of the fault itself, longer than a lease (4 s) and shorter than the watchdog's timeout
/// (8 s): nothing is waited for.
const SHORT_FREEZE: Duration = Duration::from_secs(5);
