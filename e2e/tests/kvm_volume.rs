//! The probe guest on a shared volume: `bascule-volume` and `bascule-vm` together.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use bascule_e2e::{Console, GUEST, Session, TestCluster, TestVmSpec, kvm_or_skip, wait_for};
use bascule_ipc::vm::{StopReason, VmState};
use bascule_types::Epoch;

const SOON: Duration = Duration::from_secs(30);
const VOLUME_MIB: u32 = 256;
const DISK_MIB: u32 = 16;

fn spec(options: &str) -> TestVmSpec {
    let options = format!("ip={GUEST}/24 disk_ms=0 disk_slots=64 {options}");
    TestVmSpec::probe().unwrap().with_options(&options)
}

#[test]
fn a_guest_boots_from_the_volume_and_releases_its_row_at_the_end() {
    if !kvm_or_skip("a_guest_boots_from_the_volume_and_releases_its_row_at_the_end") {
        return;
    }
    let (cluster, node) = TestCluster::new(VOLUME_MIB).unwrap();
    let vm = cluster.install(&node, spec(""), DISK_MIB).unwrap();
    let mut running = cluster.boot(&node, &vm, Epoch(0)).unwrap();
    let console = Console::new();
    console.follow(running.console().unwrap()).unwrap();
    console.wait_line("disk last=0", SOON).unwrap();
    let mut session = Session::open(&cluster.network, GUEST, SOON).unwrap();
    session.count().unwrap();
    let owner = node.rows().unwrap().vms[0].owner;
    assert_eq!(owner, Some(node.owner().unwrap()));
    let written = wait_for("the guest's first acknowledged writes", SOON, || {
        let acknowledged = session.clean_report()?.disk_ack;
        Ok((acknowledged > 0).then_some(acknowledged))
    })
    .unwrap();
    session.command("poweroff").unwrap();
    assert_eq!(
        running.wait_stopped(SOON).unwrap(),
        StopReason::GuestShutdown
    );
    assert_eq!(
        node.rows().unwrap().vms[0].owner,
        None,
        "ownership is released"
    );
    running.exit(SOON).unwrap();

    let epoch = node.rows().unwrap().vms[0].epoch;
    let mut again = cluster.boot(&node, &vm, epoch).unwrap();
    assert_eq!(again.status().unwrap().state, VmState::Running);
    // The guest responds before it has scanned its disk.
    let console = Console::new();
    console.follow(again.console().unwrap()).unwrap();
    console.wait_line("disk last=", SOON).unwrap();
    let report = Session::open(&cluster.network, GUEST, SOON)
        .unwrap()
        .clean_report()
        .unwrap();
    assert!(
        report.disk_start >= written,
        "{report}: {written} were acknowledged before"
    );
}

#[test]
fn a_dead_volume_process_stalls_the_guest_and_its_return_lets_it_go_on() {
    if !kvm_or_skip("a_dead_volume_process_stalls_the_guest_and_its_return_lets_it_go_on") {
        return;
    }
    let (cluster, mut node) = TestCluster::new(VOLUME_MIB).unwrap();
    let vm = cluster.install(&node, spec(""), DISK_MIB).unwrap();
    let mut running = cluster.boot(&node, &vm, Epoch(0)).unwrap();
    let console = Console::new();
    console.follow(running.console().unwrap()).unwrap();
    let mut session = Session::open(&cluster.network, GUEST, SOON).unwrap();
    console.wait_ticks(20, SOON).unwrap();
    node.volume_process().kill().unwrap();
    wait_for("the guest's writes to stall", SOON, || {
        let before = session.clean_report()?.disk_ack;
        console.wait_ticks(50, SOON)?;
        Ok((session.clean_report()?.disk_ack == before).then_some(()))
    })
    .unwrap();
    assert!(running.status().unwrap().io_stalled);
    let stalled_at = session.clean_report().unwrap().disk_ack;

    cluster.restart_volume(&mut node).unwrap();
    wait_for("the guest's writes to go on", SOON, || {
        Ok((session.clean_report()?.disk_ack > stalled_at).then_some(()))
    })
    .unwrap();
    console.check().unwrap();
}
