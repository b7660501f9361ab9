//! Drains of guests that do not converge, and evictions other than a drain.

use std::time::Duration;

use anyhow::ensure;
use bascule_e2e::kubernetes::{ClusterVm, Installation, NAMESPACE, Talk, condition};
use serde_json::json;

use super::CLUSTER;

/// The guest rewrites more memory than can be sent within its downtime: the VM process says so after
/// a few rounds, and the drain does not wait for the rest of the live budget, which is five minutes.
#[test]
fn a_guest_that_does_not_converge_leaves_by_quick_migration_at_once() {
    CLUSTER.with_vm("busy", 22, |cluster, vm| {
        let lab = cluster.lab();
        let limits = r#"{"spec": {"availability": {"migration": {"downtime": "1ms"}}}}"#;
        let patch = [
            "patch",
            "vm",
            "busy",
            "-n",
            NAMESPACE,
            "--type=merge",
            "-p",
            limits,
        ];
        lab.kubectl(&patch).unwrap();
        let mut talk = vm.talk().unwrap();
        let Talk::Probe(session) = &mut talk else {
            panic!("the native tier's guest is the probe")
        };
        session.command("set dirty=48M").unwrap();
        let source = vm.node().unwrap();
        cluster.drain(&source).unwrap();
        vm.wait_elsewhere(&source, Duration::from_secs(60)).unwrap();
        cluster.uncordon(&source).unwrap();
        talk.ping().unwrap();
        talk.check().unwrap();
        let moves = vm.moves().unwrap();
        let outcomes: Vec<(&str, &str)> = moves
            .iter()
            .map(|m| (m.mode.as_str(), m.phase.as_str()))
            .collect();
        assert_eq!(
            outcomes,
            [("Live", "Failed"), ("Quick", "Succeeded")],
            "{moves:?}"
        );
        let live = lab
            .get(&["vmmig", &moves[0].name, "-n", NAMESPACE])
            .unwrap();
        let reason = &live["status"]["conditions"][0]["reason"];
        assert_eq!(reason, "NotConverging", "{live}");
    });
}

/// What the guest's agent says is in the status, and in what people list.
fn shows_its_guest(cluster: &Installation, vm: &ClusterVm<'_>) {
    let address = vm.address.to_string();
    let shown = || {
        let object = vm.object()?;
        condition(&object, "GuestAgent")?;
        let status = &object["status"];
        ensure!(status["guest"]["hostName"] == "probe", "{status}");
        ensure!(
            status["interfaces"][0]["addresses"] == json!([address]),
            "{status}"
        );
        Ok(())
    };
    let lab = cluster.lab();
    lab.wait_for("the guest's address", Duration::from_secs(60), shown)
        .unwrap();
    let wide = ["get", "vm", &vm.name, "-n", NAMESPACE, "-o", "wide"];
    let listed = lab.kubectl(&wide).unwrap();
    assert!(listed.contains(&address), "{listed}");
}

/// A kubelet under memory pressure ends the reservation pod; the guest is not in the pod, and moves.
#[test]
fn an_evicted_reservation_moves_the_guest() {
    CLUSTER.with_vm("evicted", 23, |cluster, vm| {
        let lab = cluster.lab();
        let mut talk = vm.talk().unwrap();
        shows_its_guest(cluster, vm);
        let source = vm.node().unwrap();
        let label = "-lbascule.dev/virtual-machine=evicted";
        let pods = lab.get(&["pods", "-n", NAMESPACE, label]).unwrap();
        let pod = pods["items"][0]["metadata"]["name"].as_str().unwrap();
        let status = r#"{"status": {"phase": "Failed", "reason": "Evicted", "message": "memory"}}"#;
        let patch = [
            "patch",
            "pod",
            pod,
            "-n",
            NAMESPACE,
            "--subresource=status",
            "-p",
            status,
        ];
        lab.kubectl(&patch).unwrap();
        vm.wait_elsewhere(&source, Duration::from_secs(90)).unwrap();
        shows_its_guest(cluster, vm);
        talk.ping().unwrap();
        talk.check().unwrap();
        let gone = lab.wait_for("the evicted pod to go", Duration::from_secs(60), || {
            let pods = lab.get(&["pods", "-n", NAMESPACE, label])?;
            let left = pods["items"].as_array().map_or(0, Vec::len);
            anyhow::ensure!(left == 1, "{left} pods");
            Ok(())
        });
        gone.unwrap();
    });
}
