//! An isolated node: unreachable over the network, while its heartbeat on the volume continues.

use std::time::Duration;

use bascule_e2e::kubernetes::{NAMESPACE, condition};

use crate::{BACK_LIMIT, CLUSTER};

/// The network is cut for longer than every default toleration: a pod with those is evicted, the
/// guest and its reservation are not.
#[test]
fn isolated_node_keeps_its_guests() {
    CLUSTER.with_resident("isolated", |cluster, vm| {
        let lab = cluster.lab();
        let name = vm.node().unwrap();
        let node = lab.node(&name).unwrap();
        let before = vm.slot_and_epoch().unwrap();
        let reservation = vm.reservation().unwrap();
        let taken = vm.times_taken_over().unwrap();
        let moves = vm.moves().unwrap();
        let mut talk = vm.talk().unwrap();
        cluster
            .pod("control", &name, &["sleep", "infinity"])
            .unwrap();
        lab.isolate(node.index()).unwrap();
        lab.wait_for("the control pod to be evicted", EVICTION_LIMIT, || {
            talk.ping()?;
            talk.append()?;
            let pod = lab.get(&["pod", "control", "-n", NAMESPACE])?;
            let leaving = pod["metadata"]["deletionTimestamp"].is_string();
            anyhow::ensure!(leaving, "it is still there");
            Ok(())
        })
        .unwrap();
        assert_eq!(vm.reservation().unwrap(), reservation);
        assert_eq!(vm.slot_and_epoch().unwrap(), before);
        assert_eq!(vm.times_taken_over().unwrap(), taken);
        assert_eq!(vm.moves().unwrap(), moves);
        lab.heal().unwrap();
        node.wait_ready(BACK_LIMIT).unwrap();
        lab.wait_for("the guest to be ready where it was", BACK_LIMIT, || {
            condition(&vm.object()?, "Ready")?;
            anyhow::ensure!(vm.node()? == name, "it is not on {name}");
            Ok(())
        })
        .unwrap();
        talk.ping().unwrap();
        talk.check().unwrap();
        assert_eq!(vm.reservation().unwrap(), reservation);
        assert_eq!(vm.slot_and_epoch().unwrap(), before);
        cluster.delete_pod("control").unwrap();
    });
}

/// The lab's default tolerations are 20 s, after a node's grace of 16 s.
const EVICTION_LIMIT: Duration = Duration::from_secs(240);
