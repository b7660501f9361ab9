//! A scenario on native nodes with IPv4 and IPv6 addresses, whose pods and Services have both too. The other scenarios run
//! on IPv6-only nodes, and on emulated IPv4-only ones.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use bascule_e2e::kubernetes::{Installation, SYSTEM_NAMESPACE, SharedCluster, scenarios};
use bascule_lab::Node;
use serde_json::Value;

static CLUSTER: SharedCluster = SharedCluster::dual_stack(2);

#[test]
fn guests_move_and_nodes_join_on_a_dual_stack_cluster() {
    CLUSTER.with_vm("both", 10, |cluster, vm| {
        let lab = cluster.lab();
        for node in lab.nodes() {
            let object = lab.get(&["node", &node.name()]).unwrap();
            let addresses = object["status"]["addresses"].as_array().unwrap();
            let internal = addresses.iter().filter(|a| a["type"] == "InternalIP");
            let internal = internal.map(|a| a["address"].clone());
            assert_both_families(&Value::Array(internal.collect()));
        }
        let service = ["service", "bascule-operator", "-n", SYSTEM_NAMESPACE];
        let service = lab.get(&service).unwrap();
        let addresses = assert_both_families(&service["spec"]["clusterIPs"]);
        // Every node's daemon has joined by one of them.
        for node in lab.nodes() {
            for address in &addresses {
                connect(&node, *address).unwrap();
            }
        }

        let source = vm.node().unwrap();
        let drained = scenarios::drain_moves_vms_live(cluster, &source, &[vm]).unwrap();
        println!("{drained:?}");
        scenarios::quick_migration_round_trip(vm).unwrap();
        assert_daemons_join_by(cluster, addresses[1]);
        let moved = vm.migrate("Live", Some(&source)).unwrap();
        assert_ne!(moved.source, moved.target, "{moved:?}");
        vm.talk().unwrap().check().unwrap();
    });
}

/// An IPv4 and then an IPv6 address.
fn assert_both_families(list: &Value) -> Vec<IpAddr> {
    let texts = list.as_array().into_iter().flatten();
    let addresses: Vec<IpAddr> = texts
        .map(|text| text.as_str().unwrap().parse().unwrap())
        .collect();
    let families: Vec<bool> = addresses.iter().map(IpAddr::is_ipv6).collect();
    assert_eq!(families, [false, true], "{list}");
    addresses
}

/// Connects a node to the port of the operator on which daemons join.
fn connect(node: &Node<'_>, address: IpAddr) -> Result<()> {
    let dial = format!("exec 3<>/dev/tcp/{address}/{JOIN_PORT}");
    let dial = ["10", "bash", "-c", &dial];
    let dialled = node.in_netns("timeout").args(dial).output()?;
    let node = node.name();
    ensure!(dialled.status.success(), "{node} cannot reach {address}");
    Ok(())
}

/// Nodes without a certificate get one by way of this address of the Service.
fn assert_daemons_join_by(cluster: &Installation, address: IpAddr) {
    let lab = cluster.lab();
    let operator = format!("--set=operator.address=[{address}]:{JOIN_PORT}");
    lab.install_bascule(&["--set=log.format=text", &operator])
        .unwrap();
    for node in lab.nodes() {
        // The directory stays: VM processes may open what is in this one.
        let remove = "rm /var/lib/bascule/tls/* /var/lib/bascule/identity.json";
        node.exec(&["sh", "-c", remove]).unwrap();
        cluster.restart_daemon(&node.name()).unwrap();
    }
    cluster.wait_volume().unwrap();
    for node in lab.nodes() {
        let joined = node.exec(&["ls", "/var/lib/bascule/tls"]);
        joined.context("it has no certificate").unwrap();
    }
}

const JOIN_PORT: u16 = 7409;
