//! The scenarios on emulated nodes: real Kubernetes, AMD-V, an unmodified Debian kernel in the
//! guest, a watchdog outside the machine.
//!
//! One cluster serves all of them, one after the other; each has a virtual machine of its own.

use std::sync::OnceLock;
use std::time::Duration;

use bascule_e2e::kubernetes::{ClusterVm, Installation, NAMESPACE};
use bascule_e2e::kvm_or_skip;
use bascule_lab::Lab;

/// The cluster, with a volume on it. The lab ends with this process.
fn cluster() -> &'static Installation {
    static CLUSTER: OnceLock<Installation> = OnceLock::new();
    CLUSTER.get_or_init(|| {
        let installation =
            Installation::on(Lab::emulated(3).expect("a lab")).expect("Bascule on it");
        installation.volume().expect("a SharedVolume");
        installation
    })
}

fn with_vm(name: &str, number: u8, scenario: impl FnOnce(&Installation, &ClusterVm<'_>)) {
    if !kvm_or_skip(name) {
        return;
    }
    let cluster = cluster();
    let vm = cluster.vm(name, number).expect("a virtual machine");
    scenario(cluster, &vm);
    vm.delete().expect("its deletion");
}

#[test]
fn drain_moves_vm_live_and_tcp_session_survives() {
    with_vm("drained", 101, |cluster, vm| {
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
    with_vm("cut", 102, |cluster, vm| {
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
