//! Loss of the backing device: on all nodes for a few seconds, on one node permanently.

use std::time::{Duration, SystemTime};

use anyhow::ensure;
use bascule_e2e::kubernetes::{VOLUME, scenarios};

use crate::watchdog::resets;
use crate::{BACK_LIMIT, CLUSTER, WRITEBACK};

/// Guests stall without an I/O error, and no takeover happens.
#[test]
fn backing_gone_on_all_nodes_for_a_moment_loses_nothing() {
    CLUSTER.with_resident("stalled", |cluster, vm| {
        let mut talk = vm.talk().unwrap();
        let promised = talk.append().unwrap();
        let (_, epoch) = vm.slot_and_epoch().unwrap();
        let taken = vm.times_taken_over().unwrap();
        for node in cluster.lab().nodes() {
            node.stall_disk().unwrap();
        }
        // The length of the fault itself: longer than a lease, shorter than a watchdog's timeout.
        std::thread::sleep(Duration::from_secs(5));
        for node in cluster.lab().nodes() {
            node.resume_disk().unwrap();
        }
        assert_eq!(talk.append().unwrap(), promised + 1);
        talk.check().unwrap();
        vm.wait_ready(BACK_LIMIT).unwrap();
        assert_eq!(vm.slot_and_epoch().unwrap().1, epoch);
        assert_eq!(vm.times_taken_over().unwrap(), taken);
        cluster.wait_volume().unwrap();
    });
}

/// A fail-over of the storage that takes longer than leases and watchdog together resets no node whose
/// guests have no write in flight: the volume is withdrawn from the watchdog, and enlisted again before a
/// gate opens. No multipath here: the path itself stalls, as it does until multipath has changed it.
#[test]
fn backing_gone_for_half_a_minute_resets_nobody_whose_writes_are_complete() {
    CLUSTER.with_resident("quiet", |cluster, vm| {
        let lab = cluster.lab();
        let mut talk = vm.talk().unwrap();
        let promised = talk.append().unwrap();
        let (_, epoch) = vm.slot_and_epoch().unwrap();
        // What else the guest has dirtied must be written: a node with a write in flight is reset.
        std::thread::sleep(WRITEBACK);
        let (taken, before) = (vm.times_taken_over().unwrap(), resets(lab).unwrap());
        for node in lab.nodes() {
            node.stall_disk().unwrap();
        }
        // The length of the fault itself: longer than lease and watchdog timeout together.
        std::thread::sleep(Duration::from_secs(30));
        for node in lab.nodes() {
            node.resume_disk().unwrap();
        }
        assert_eq!(talk.append().unwrap(), promised + 1);
        talk.check().unwrap();
        vm.wait_ready(BACK_LIMIT).unwrap();
        assert_eq!(resets(lab).unwrap(), before, "a watchdog reset a node");
        assert_eq!(vm.slot_and_epoch().unwrap().1, epoch);
        assert_eq!(vm.times_taken_over().unwrap(), taken);
        cluster.wait_volume().unwrap();
    });
}

/// The node reports the lost device. It cannot finish its writes, so its watchdog resets it, and the
/// guest starts elsewhere.
#[test]
fn backing_gone_on_one_node_restarts_vm_elsewhere() {
    CLUSTER.with_resident("pathless", |cluster, vm| {
        let lab = cluster.lab();
        let from = vm.node().unwrap();
        let node = lab.node(&from).unwrap();
        let since = SystemTime::now();
        let writer = vm.writer().unwrap();
        node.stall_disk().unwrap();
        lab.wait_for("the node's loss to be shown", BACK_LIMIT, || {
            let volume = lab.get(&["sharedvolume", VOLUME])?;
            let nodes = volume["status"]["nodes"].as_array();
            let access = nodes
                .into_iter()
                .flatten()
                .find(|n| n["name"] == from.as_str());
            let shown = access.is_some_and(|access| access["state"] != "Direct");
            ensure!(shown, "it is shown as {access:?}");
            Ok(())
        })
        .unwrap();
        let (to, takeover) = scenarios::restarted_elsewhere(vm, &from, writer).unwrap();
        println!("{}", takeover.detail);
        vm.succession(since, &from, &to).unwrap();
        cluster.wait_back(&from).unwrap();
    });
}
