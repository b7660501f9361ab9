//! What happens to a node besides its loss: its Node object is registered anew, its host shuts down.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bascule_e2e::kubernetes::{ClusterVm, Installation, NAMESPACE, VOLUME};
use bascule_lab::Service;
use serde_json::Value;

use super::CLUSTER;

/// It takes a quarter of a minute.
#[test]
fn a_node_that_is_registered_anew_joins_at_once_and_keeps_its_slot_and_its_guest() {
    CLUSTER.with_vm("anew", 81, |cluster, vm| {
        let lab = cluster.lab();
        let mut talk = vm.talk().unwrap();
        let name = vm.node().unwrap();
        let node = lab.node(&name).unwrap();
        let held = vm.slot_and_epoch().unwrap();
        let process = vm_processes(&node).unwrap();
        let uid = |object: Value| object["metadata"]["uid"].as_str().map(str::to_owned);
        let before = uid(lab.get(&["node", &name]).unwrap());

        lab.kubectl(&["delete", "node", &name]).unwrap();
        // A kubelet registers its node when it starts.
        node.kill_service(Service::Kubelet).unwrap();
        let begin = Instant::now();
        node.wait_ready(BACK_LIMIT).unwrap();
        let after = uid(lab.get(&["node", &name]).unwrap());
        assert!(
            after.is_some() && after != before,
            "it was not registered anew"
        );
        println!("registered anew after {:?}", begin.elapsed());
        talk.ping().unwrap();
        talk.append().unwrap();
        // The operator accepts no report of the old UID.
        vm.wait_ready(BACK_LIMIT).unwrap();
        cluster.wait_volume().unwrap();
        assert_eq!(vm.node().unwrap(), name);
        assert_eq!(vm.slot_and_epoch().unwrap(), held);
        assert_eq!(vm_processes(&node).unwrap(), process);

        // It obeys the operator: the guest leaves and comes back.
        let other = other_than(cluster, &name);
        vm.migrate("Live", Some(&other)).unwrap();
        println!("joined, and its guest moved, after {:?}", begin.elapsed());
        vm.migrate("Live", Some(&name)).unwrap();
        talk.ping().unwrap();
        talk.check().unwrap();
    });
}

/// As the unit that is shipped for it does. It takes ten seconds.
#[test]
fn a_host_that_shuts_down_has_its_guests_switch_off_and_they_start_elsewhere_without_a_failover() {
    let name = "a_host_that_shuts_down_has_its_guests_switch_off_and_they_start_elsewhere_without_a_failover";
    CLUSTER.with(name, |cluster| {
        let lab = cluster.lab();
        // Longer than the command may take: it succeeds only if the guest follows its power button.
        let patient = "{downtime: 2s, shutdownTimeout: 10m}";
        let document = cluster.document("switched-off", 82);
        assert!(document.contains("{downtime: 2s}"), "{document}");
        lab.apply(&document.replacen("{downtime: 2s}", patient, 1))
            .unwrap();
        let vm = cluster.handle("switched-off", 82);
        vm.wait_ready(BACK_LIMIT).unwrap();
        let promised = vm.talk().unwrap().append().unwrap();
        let from = vm.node().unwrap();
        let node = lab.node(&from).unwrap();
        let (_, epoch) = vm.slot_and_epoch().unwrap();

        let begin = Instant::now();
        node.exec(&["sh", "-c", &unit_command("ExecStop")]).unwrap();
        println!("the guest was off after {:?}", begin.elapsed());
        lab.wait_for("the node to say so", BACK_LIMIT, || {
            let said = on_volume(cluster, &from)?["kvmError"].to_string();
            ensure!(said.contains("is shutting down"), "{said}");
            // The daemon has collected the process by then, or soon after.
            let left = vm_processes(&node)?;
            ensure!(left.is_empty(), "still there: {left}");
            Ok(())
        })
        .unwrap();
        // The volume has no watchdog: what was not released would wait for a manual confirmation.
        vm.wait_elsewhere(&from, BACK_LIMIT).unwrap();
        println!("it ran elsewhere after {:?}", begin.elapsed());
        let mut talk = vm.talk().unwrap();
        let found = talk.check().unwrap();
        assert!(found >= promised, "{found} of {promised} records are left");
        assert_eq!(vm.slot_and_epoch().unwrap().1, epoch.next());
        assert_eq!(failovers(cluster, &vm).unwrap(), 0);

        node.exec(&["sh", "-c", &unit_command("ExecStart")])
            .unwrap();
        lab.wait_for("the node to take guests again", BACK_LIMIT, || {
            let said = on_volume(cluster, &from)?["kvmError"].clone();
            ensure!(said.is_null(), "{said}");
            Ok(())
        })
        .unwrap();
        vm.migrate("Live", Some(&from)).unwrap();
        talk.ping().unwrap();
        talk.check().unwrap();
        vm.delete().unwrap();
    });
}

/// A command of the unit in `examples/bascule-guests.service`.
fn unit_command(which: &str) -> String {
    let unit = include_str!("../../../examples/bascule-guests.service");
    let mut lines = unit.lines();
    let command = lines.find_map(|line| line.strip_prefix(which)?.strip_prefix('='));
    // systemd's mark of a command that may fail.
    command.unwrap().trim_start_matches('-').to_owned()
}

/// The process ids of the VMs of a node.
fn vm_processes(node: &bascule_lab::Node<'_>) -> Result<String> {
    let found = node.try_exec(&["pgrep", "-x", "bascule-vm"], None, BACK_LIMIT)?;
    Ok(found.stdout)
}

/// A node's entry in the volume's status.
fn on_volume(cluster: &Installation, node: &str) -> Result<Value> {
    let volume = cluster.lab().get(&["sharedvolume", VOLUME])?;
    let mut nodes = volume["status"]["nodes"].as_array().into_iter().flatten();
    let found = nodes.find(|entry| entry["name"] == node);
    found
        .cloned()
        .with_context(|| format!("{node} is not on it"))
}

fn failovers(cluster: &Installation, vm: &ClusterVm<'_>) -> Result<usize> {
    let list = cluster.lab().get(&["failover", "-n", NAMESPACE])?;
    let items = list["items"].as_array().into_iter().flatten();
    Ok(items
        .filter(|item| item["spec"]["virtualMachine"] == *vm.name)
        .count())
}

fn other_than(cluster: &Installation, node: &str) -> String {
    let mut names = cluster.lab().nodes().map(|node| node.name());
    names.find(|name| name != node).unwrap()
}

/// The start of a node's services or of a VM, with room for a busy machine.
const BACK_LIMIT: Duration = Duration::from_secs(120);
