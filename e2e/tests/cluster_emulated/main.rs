//! The scenarios on emulated nodes: real Kubernetes, AMD-V, an unmodified Debian kernel in the
//! guest, a watchdog outside the machine.
//!
//! One cluster serves all of them, one after the other, and one virtual machine most of them.

mod clock;
mod fencing;
mod firmware;
mod isolation;
mod memory;
mod san;
mod storage;
mod watchdog;

use std::time::Duration;

use bascule_e2e::kubernetes::{SharedCluster, scenarios};
use bascule_lab::Tier;

static CLUSTER: SharedCluster = SharedCluster::new(Tier::Emulated, 3);

#[test]
fn install_and_first_vm() {
    CLUSTER.with_resident("first", |cluster, vm| {
        scenarios::install_and_first_vm(cluster, vm).unwrap();
    });
}

#[test]
fn drain_moves_vm_live_and_tcp_session_survives() {
    CLUSTER.with_resident("drained", |cluster, vm| {
        let source = vm.node().unwrap();
        let drained = scenarios::drain_moves_vms_live(cluster, &source, &[vm]).unwrap();
        println!("{drained:?}");
    });
}

#[test]
fn quick_migration_round_trip() {
    CLUSTER.with_resident("quick", |_, vm| {
        scenarios::quick_migration_round_trip(vm).unwrap();
    });
}

#[test]
fn killing_daemon_operator_apiserver_stops_no_guest() {
    CLUSTER.with_resident("survivor", |cluster, vm| {
        scenarios::killing_daemon_operator_apiserver_stops_no_guest(cluster, vm).unwrap();
    });
}

/// Boot of an emulated node and the start of its daemon.
const BACK_LIMIT: Duration = Duration::from_secs(420);
/// Linux writes metadata back 30 s after it was made dirty, and looks every 5 s: what a guest has not written then, it
/// will not write by itself.
const WRITEBACK: Duration = Duration::from_secs(36);
