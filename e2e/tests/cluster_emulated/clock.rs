//! A node whose clock is wrong: leases are counted in what a clock of one's own has run, never in
//! what somebody else's shows.

use anyhow::{Context, Result, ensure};
use bascule_e2e::kubernetes::{ClusterVm, Installation};
use bascule_lab::Node;

use crate::{BACK_LIMIT, CLUSTER};

#[test]
fn clock_of_one_node_an_hour_off_harms_nothing() {
    CLUSTER.with_vm("timeless", 140, |cluster, vm| {
        let home = vm.node().unwrap();
        let node = cluster.lab().node(&home).unwrap();
        for jump in [HOUR, -2 * HOUR] {
            set_clock(&node, jump).unwrap();
            moves_away_and_back(cluster, vm, &home).unwrap();
        }
        set_clock(&node, HOUR).unwrap();
        vm.never_taken_over().unwrap();
    });
}

/// The daemon starts anew with that clock and is let in; the guest moves both ways.
fn moves_away_and_back(cluster: &Installation, vm: &ClusterVm<'_>, home: &str) -> Result<()> {
    let mut talk = vm.talk()?;
    cluster.restart_daemon(home)?;
    vm.wait_ready(BACK_LIMIT)?;
    let away = vm.migrate("Live", None)?;
    ensure!(away.source == home, "{away:?}");
    talk.ping()?;
    talk.append()?;
    let back = vm.migrate("Live", Some(home))?;
    ensure!(back.target == home, "{back:?}");
    talk.ping()?;
    talk.check()?;
    Ok(())
}

/// Moves the node's clock, and makes sure that it did.
fn set_clock(node: &Node<'_>, jump: i64) -> Result<()> {
    let clock = || -> Result<i64> {
        let said = node.exec(&["date", "+%s"])?;
        said.trim().parse().with_context(|| format!("date: {said}"))
    };
    let (before, wanted) = (clock()?, clock()? + jump);
    node.exec(&["date", "-s", &format!("@{wanted}")])?;
    let moved = clock()? - before;
    ensure!(
        (moved - jump).abs() < HOUR / 2,
        "the clock moved by {moved} s"
    );
    Ok(())
}

/// In seconds.
const HOUR: i64 = 3600;
