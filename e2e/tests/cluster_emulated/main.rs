//! The scenarios on emulated nodes: real Kubernetes, AMD-V, an unmodified Debian kernel in the
//! guest, a watchdog outside the machine.
//!
//! One cluster serves all of them, one after the other; each has a virtual machine of its own.

use std::time::Duration;

use bascule_e2e::kubernetes::{NAMESPACE, SharedCluster};
use bascule_lab::Tier;

static CLUSTER: SharedCluster = SharedCluster::new(Tier::Emulated, 3);

#[test]
fn drain_moves_vm_live_and_tcp_session_survives() {
    CLUSTER.with_vm("drained", 101, |cluster, vm| {
        let mut talk = vm.talk().unwrap();
        let source = vm.node().unwrap();
        let flow = vm.flow().unwrap();
        let took = cluster.drain(&source).unwrap();
        vm.wait_elsewhere(&source, Duration::from_secs(120))
            .unwrap();
        let seen = flow.finish().unwrap();
        talk.ping().unwrap();
        talk.check().unwrap();
        cluster.uncordon(&source).unwrap();
        let moves = vm.moves().unwrap();
        let moved = moves.last().unwrap();
        assert_eq!(
            (moved.mode.as_str(), moved.phase.as_str()),
            ("Live", "Succeeded")
        );
        println!("drain took {took:?}; seen by the client: {seen:?}; {moves:?}");
    });
}

#[test]
fn power_cut_restarts_vm_elsewhere_with_proof() {
    CLUSTER.with_vm("cut", 102, |cluster, vm| {
        let mut talk = vm.talk().unwrap();
        let promised = talk.append().unwrap();
        let node = vm.node().unwrap();
        cluster.lab().node(&node).unwrap().cut().unwrap();
        vm.wait_elsewhere(&node, Duration::from_secs(420)).unwrap();
        let mut after = vm.talk().unwrap();
        let found = after.check().unwrap();
        assert!(
            found >= promised,
            "{promised} records were flushed, {found} are there"
        );
        let records = cluster.lab().get(&["failover", "-n", NAMESPACE]).unwrap();
        let record = records["items"].as_array().unwrap().last().unwrap();
        let status = &record["status"];
        assert_eq!(status["proof"]["kind"], "SafeTimeElapsed", "{record}");
        assert!(status["takenOverAt"].is_string(), "{record}");
        println!("{status:#}");
        cluster.lab().node(&node).unwrap().boot().unwrap();
    });
}
