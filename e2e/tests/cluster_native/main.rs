//! The scenarios on native nodes: real Kubernetes, this machine's /dev/kvm, the probe guest.
//!
//! One cluster serves all of them, one after the other; each has a virtual machine of its own.

use std::time::{Duration, Instant};

use bascule_e2e::kubernetes::{SYSTEM_NAMESPACE, SharedCluster, condition};
use bascule_lab::{Component, Tier};

static CLUSTER: SharedCluster = SharedCluster::new(Tier::Native, 2);

#[test]
fn install_and_first_vm() {
    CLUSTER.with_vm("first", 10, |cluster, vm| {
        let mut talk = vm.talk().unwrap();
        talk.ping().unwrap();
        talk.check().unwrap();
        let overview = cluster.overview().unwrap();
        for wanted in [
            "virtualmachine.bascule.dev/first",
            "sharedvolume.bascule.dev/gold",
        ] {
            assert!(overview.contains(wanted), "{overview}");
        }
    });
}

#[test]
fn drain_moves_vm_live_and_tcp_session_survives() {
    CLUSTER.with_vm("drained", 11, |cluster, vm| {
        let mut talk = vm.talk().unwrap();
        talk.ping().unwrap();
        let source = vm.node().unwrap();
        let flow = vm.flow().unwrap();
        let took = cluster.drain(&source).unwrap();
        let target = vm.wait_elsewhere(&source, Duration::from_secs(60)).unwrap();
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
        assert_eq!((&moved.source, &moved.target), (&source, &target));
        println!("drain took {took:?}; seen by the client: {seen:?}; {moved:?}");
    });
}

#[test]
fn quick_migration_round_trip() {
    CLUSTER.with_vm("quick", 12, |_, vm| {
        let mut talk = vm.talk().unwrap();
        let home = vm.node().unwrap();
        for _ in 0..2 {
            let moved = vm.migrate("Quick", None).unwrap();
            assert_eq!(moved.mode, "Quick");
            talk.ping().unwrap();
            talk.check().unwrap();
        }
        assert_eq!(vm.node().unwrap(), home);
    });
}

#[test]
fn killing_daemon_operator_apiserver_stops_no_guest() {
    CLUSTER.with_vm("survivor", 13, |cluster, vm| {
        let mut talk = vm.talk().unwrap();
        let lab = cluster.lab();
        let system = ["-n", SYSTEM_NAMESPACE];
        let delete = |component: &str| {
            let label = format!("-lapp.kubernetes.io/component={component}");
            let args = [
                "delete",
                "pod",
                "--grace-period=0",
                "--force",
                "--wait=false",
                &label,
            ];
            lab.kubectl(&[&args[..], &system[..]].concat()).unwrap();
        };
        delete("node");
        delete("operator");
        lab.kill(Component::Apiserver).unwrap();
        let begin = Instant::now();
        // Longer than a volume's lease: the heartbeat goes on without any of them.
        while begin.elapsed() < Duration::from_secs(10) {
            talk.ping().unwrap();
        }
        lab.restart(Component::Apiserver).unwrap();
        talk.ping().unwrap();
        talk.check().unwrap();
        vm.wait_ready(Duration::from_secs(120)).unwrap();
        // The daemons that came back know the guest: it can be moved.
        let moved = vm.migrate("Live", None).unwrap();
        assert_ne!(moved.source, moved.target);
        talk.ping().unwrap();
    });
}

#[test]
fn two_operators_cannot_double_start() {
    CLUSTER.with_vm("single", 14, |cluster, vm| {
        let lab = cluster.lab();
        let mut talk = vm.talk().unwrap();
        let home = vm.node().unwrap();
        // Without its Lease both replicas believe that they may lead.
        let args = ["-n", SYSTEM_NAMESPACE, "delete", "lease", "--all"];
        for _ in 0..3 {
            lab.kubectl(&args).unwrap();
            talk.ping().unwrap();
            // A new leader knows nothing until the nodes have reported to it.
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

/// A Lease of 15 s that was lost, and the nodes' streams.
const LEADER_LIMIT: Duration = Duration::from_secs(90);
