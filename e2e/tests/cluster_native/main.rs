//! The scenarios on native nodes: real Kubernetes, this machine's /dev/kvm, the probe guest.
//!
//! One cluster serves all of them, one after the other; each has a virtual machine of its own.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod authorization;
mod bad_input;
mod chart;
mod console;
mod drain;
mod forgeries;
mod imports;
mod lost_node;
mod networks;
mod nodes;
mod private_ca;
mod secrets;
mod tenants;

use std::time::Duration;

use bascule_e2e::kubernetes::{
    Beside, ClusterVm, SYSTEM_NAMESPACE, SharedCluster, condition, scenarios,
};
use bascule_lab::Tier;

static CLUSTER: SharedCluster = SharedCluster::new(Tier::Native, 2);

#[test]
fn install_and_first_vm() {
    CLUSTER.with_vm("first", 10, |cluster, vm| {
        scenarios::install_and_first_vm(cluster, vm).unwrap();
    });
}

#[test]
fn drain_moves_vm_live_and_tcp_session_survives() {
    CLUSTER.with_vm("drained", 11, |cluster, vm| {
        // The drain ends the operator's leader too.
        let source = vm.place(Beside::Leader).unwrap();
        let drained = scenarios::drain_moves_vms_live(cluster, &source, &[vm]).unwrap();
        println!("{drained:?}");
    });
}

#[test]
fn quick_migration_round_trip() {
    CLUSTER.with_vm("quick", 12, |_, vm| {
        scenarios::quick_migration_round_trip(vm).unwrap();
    });
}

#[test]
fn killing_daemon_operator_apiserver_stops_no_guest() {
    CLUSTER.with_vm("survivor", 13, |cluster, vm| {
        scenarios::killing_daemon_operator_apiserver_stops_no_guest(cluster, vm).unwrap();
    });
}

#[test]
fn two_operators_cannot_double_start() {
    CLUSTER.with_vm("single", 14, |cluster, vm| {
        let lab = cluster.lab();
        let mut talk = vm.talk().unwrap();
        let home = vm.node().unwrap();
        let since = ready_since(vm);
        // Without the Lease both replicas may act as leader.
        let args = ["-n", SYSTEM_NAMESPACE, "delete", "lease", "--all"];
        for _ in 0..3 {
            lab.kubectl(&args).unwrap();
            talk.ping().unwrap();
            // A new leader must not report as not ready what it has not observed yet.
            condition(&vm.object().unwrap(), "Ready").unwrap();
            lab.wait_for(
                "the new leader to find the guest where it is",
                LEADER_LIMIT,
                || {
                    condition(&vm.object()?, "Ready")?;
                    anyhow::ensure!(vm.node()? == home, "it is not on {home}");
                    Ok(())
                },
            )
            .unwrap();
        }
        talk.check().unwrap();
        assert_eq!(ready_since(vm), since, "Ready was never set to False");
        let processes: usize = lab
            .nodes()
            .map(|node| {
                node.exec(&["pgrep", "-c", "-x", "bascule-vm"])
                    .unwrap_or_default()
            })
            .filter_map(|count| count.trim().parse::<usize>().ok())
            .sum();
        assert_eq!(
            processes, 1,
            "one virtual machine, one process on all nodes"
        );
    });
}

/// lastTransitionTime of the VM's Ready condition.
fn ready_since(vm: &ClusterVm<'_>) -> String {
    let object = vm.object().unwrap();
    let conditions = object["status"]["conditions"].as_array().unwrap();
    let ready = conditions.iter().find(|c| c["type"] == "Ready").unwrap();
    ready["lastTransitionTime"].to_string()
}

/// Expiry of the leader's Lease, on a busy machine.
const LEADER_LIMIT: Duration = Duration::from_secs(90);
