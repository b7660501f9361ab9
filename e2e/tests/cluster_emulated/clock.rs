//! A node with a wrong wall clock: leases are measured with each node's monotonic clock, never by
//! comparing clocks of different nodes.

use anyhow::{Context, Result, ensure};
use bascule_lab::Node;

use crate::CLUSTER;

#[test]
fn clock_of_one_node_an_hour_off_harms_nothing() {
    CLUSTER.with_resident("timeless", |cluster, vm| {
        let home = vm.node().unwrap();
        let node = cluster.lab().node(&home).unwrap();
        let mut talk = vm.talk().unwrap();
        let taken = vm.times_taken_over().unwrap();
        // An hour ahead, and the guest leaves; an hour behind, and it comes back.
        for (jump, target) in [(HOUR, None), (-2 * HOUR, Some(home.as_str()))] {
            set_clock(&node, jump).unwrap();
            // The daemon starts anew with that clock, and is let in.
            cluster.restart_daemon(&home).unwrap();
            cluster.wait_volume().unwrap();
            let moved = vm.migrate("Live", target).unwrap();
            assert!(moved.source == home || moved.target == home, "{moved:?}");
            talk.ping().unwrap();
            talk.append().unwrap();
        }
        talk.check().unwrap();
        set_clock(&node, HOUR).unwrap();
        assert_eq!(vm.times_taken_over().unwrap(), taken);
    });
}

/// Moves the node's clock, and makes sure that it did.
fn set_clock(node: &Node<'_>, jump: i64) -> Result<()> {
    let clock = || -> Result<i64> {
        let said = node.exec(&["date", "+%s"])?;
        said.trim().parse().with_context(|| format!("date: {said}"))
    };
    let before = clock()?;
    // Relative, so that there and back again loses nothing: other scenarios read this clock.
    node.exec(&["date", "-s", &format!("now {jump:+} seconds")])?;
    let moved = clock()? - before;
    ensure!(
        (moved - jump).abs() < HOUR / 2,
        "the clock moved by {moved} s"
    );
    Ok(())
}

/// In seconds.
const HOUR: i64 = 3600;
