//! Live migration between two nodes on one volume, with the probe guest, seen from outside.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use bascule_e2e::{Flow, GUEST, TwoNodes, kvm_or_skip, wait_for};
use bascule_ipc::vm::{MigrationLimits, MigrationPhase, StopReason, VmState};
use bascule_types::Epoch;

const SOON: Duration = Duration::from_secs(30);

#[test]
fn a_guest_moves_live_and_its_session_goes_on() {
    if !kvm_or_skip("a_guest_moves_live_and_its_session_goes_on") {
        return;
    }
    let lab = TwoNodes::new("tick_ms=1 dirty=8M fill=32M").unwrap();
    let mut guest = lab.boot(&lab.vm).unwrap();
    let flow = Flow::start(&lab.cluster.network, GUEST).unwrap();
    guest.console.wait_ticks(100, SOON).unwrap();
    let (before, started) = (lab.epoch().unwrap(), Instant::now());
    let identified = guest.session.written_report(SOON).unwrap();
    assert_ne!(identified.disk_serial, 0, "{identified}");
    let outcome = lab.migrate(&mut guest).unwrap();
    guest.console.wait_ticks(100, SOON).unwrap();
    guest.check().unwrap();
    // The guest itself compares it with the first one.
    wait_for("the disk's serial number to be read again", SOON, || {
        let report = guest.session.clean_report()?;
        Ok((report.disk_serial_reads > identified.disk_serial_reads + 1).then_some(()))
    })
    .unwrap();
    let summary = flow.finish().unwrap();
    assert_eq!(summary.duplicated, 0, "{summary:?}");
    println!(
        "ticks {:?}, {summary:?}, {outcome:?}",
        guest.console.gap_max(started)
    );
    assert_eq!(lab.epoch().unwrap(), before.next());
    let row = lab.nodes[0].rows().unwrap().vms.remove(0);
    assert_eq!(row.owner, Some(lab.nodes[1].owner().unwrap()));

    // The exit is recorded with the ownership in which it ran last.
    guest.session.command("poweroff").unwrap();
    let reason = guest.vm.wait_stopped(SOON).unwrap();
    assert_eq!(reason, StopReason::GuestShutdown);
    assert_eq!(guest.vm.status().unwrap().epoch, before.next());
}

#[test]
fn twenty_migrations_back_and_forth() {
    if !kvm_or_skip("twenty_migrations_back_and_forth") {
        return;
    }
    let lab = TwoNodes::new("tick_ms=5 dirty=16M rate=16M fill=32M").unwrap();
    let mut guest = lab.boot(&lab.vm).unwrap();
    for count in 1..=20 {
        lab.migrate(&mut guest).unwrap();
        guest.check().unwrap();
        assert_eq!(lab.epoch().unwrap(), Epoch(count + 1));
    }
}

#[test]
fn a_destination_that_dies_leaves_the_guest_unharmed_and_movable() {
    if !kvm_or_skip("a_destination_that_dies_leaves_the_guest_unharmed_and_movable") {
        return;
    }
    let lab = TwoNodes::new("tick_ms=5 dirty=16M fill=64M").unwrap();
    let mut guest = lab.boot(&lab.vm).unwrap();
    guest.console.wait_line("memory filled", SOON).unwrap();
    let limits = MigrationLimits::default();
    let (mut destination, _) = lab.begin(&mut guest, &lab.vm, limits).unwrap();
    destination.process().kill().unwrap();
    let outcome = guest.vm.wait_migration(SOON).unwrap();
    assert_eq!(outcome.phase, MigrationPhase::Failed, "{outcome:?}");
    assert_eq!(guest.vm.status().unwrap().state, VmState::Running);
    guest.check().unwrap();
    lab.migrate(&mut guest).unwrap();
    guest.check().unwrap();
}
