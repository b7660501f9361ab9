//! Nodes that are lost, and nodes that come back from the dead: never two writers.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, ensure};
use bascule_e2e::kubernetes::{ClusterVm, Installation, scenarios};
use bascule_e2e::wait_for;
use bascule_lab::Node;
use jiff::Timestamp;

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

/// The whole machine stands still, its clock and its watchdog outside go on.
#[test]
fn frozen_node_never_writes_after_takeover() {
    CLUSTER.with_resident("frozen", |cluster, vm| {
        let freeze = |node: &Node<'_>| node.freeze();
        let thaw = |node: &Node<'_>| node.thaw();
        frozen_for_less_than_the_timeout(cluster, vm, freeze, thaw).unwrap();
        frozen_for_longer(cluster, vm, freeze).unwrap();
    });
}

/// Only our processes stand still, and the rest of the node goes on, its watchdog's owner included.
#[test]
fn frozen_node_never_writes_after_takeover_with_only_our_processes_frozen() {
    CLUSTER.with_resident("stopped", |cluster, vm| {
        let signal = |node: &Node<'_>, signal: &str| {
            for program in ["bascule-volume", "bascule-vm"] {
                node.exec(&["pkill", signal, "-x", program])?;
            }
            Ok(())
        };
        let stop = |node: &Node<'_>| signal(node, "-STOP");
        let go_on = |node: &Node<'_>| signal(node, "-CONT");
        frozen_for_less_than_the_timeout(cluster, vm, stop, go_on).unwrap();
        frozen_for_longer(cluster, vm, stop).unwrap();
    });
}

/// It goes on with its lease lapsed, checks it, and finds that nobody took anything from it.
fn frozen_for_less_than_the_timeout(
    cluster: &Installation,
    vm: &ClusterVm<'_>,
    freeze: impl Fn(&Node<'_>) -> Result<()>,
    thaw: impl Fn(&Node<'_>) -> Result<()>,
) -> Result<()> {
    let name = vm.node()?;
    let node = cluster.lab().node(&name)?;
    let resets = node.watchdog_resets()?;
    let (_, epoch) = vm.tenure()?;
    let taken = vm.times_taken_over()?;
    let mut talk = vm.talk()?;
    let promised = talk.append()?;
    freeze(&node)?;
    // The length of the fault itself: nothing is waited for.
    std::thread::sleep(SHORT_FREEZE);
    thaw(&node)?;
    talk.ping()?;
    ensure!(talk.append()? == promised + 1);
    talk.check()?;
    vm.wait_ready(BACK_LIMIT)?;
    ensure!(vm.node()? == name);
    ensure!(vm.tenure()?.1 == epoch, "somebody took it");
    ensure!(vm.times_taken_over()? == taken);
    ensure!(node.watchdog_resets()? == resets);
    Ok(())
}

/// It is reset before the guest starts elsewhere, and none of its writes comes after.
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
    let reset = wait_for("the watchdog to reset the node", RESET_LIMIT, || {
        Ok(node.watchdog_resets()?.get(resets).copied())
    })?;
    println!("{from} was reset {:?} after the freeze", frozen.elapsed());
    let (to, takeover) = scenarios::restarted_elsewhere(vm, &from, writer)?;
    let succession = vm.succession(since, &from, &to)?;
    println!("{}; {succession:?}", takeover.detail);
    ensure!(
        succession.last < reset && reset < succession.first,
        "reset at {reset:?}, {succession:?}"
    );
    let reset = Timestamp::try_from(reset)?;
    // The API's times are whole seconds, rounded down.
    let taken_over = takeover.taken_over + Duration::from_secs(1);
    ensure!(reset < taken_over, "reset at {reset}, {takeover:?}");
    cluster.wait_back(&from)
}

/// Longer than a lease (4 s), shorter than the watchdog's timeout (8 s).
const SHORT_FREEZE: Duration = Duration::from_secs(5);
/// The watchdog's timeout, and the machine's death.
const RESET_LIMIT: Duration = Duration::from_secs(60);
