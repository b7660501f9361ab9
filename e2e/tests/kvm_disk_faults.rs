//! Hanging and failing disks under a running guest.
#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::time::Duration;

use bascule_e2e::{
    Console, GUEST, HangingDisk, Network, Session, TestVm, TestVmSpec, TwoNodes, kvm_or_skip,
    wait_for,
};
use bascule_ipc::vm::{MigrationLimits, MigrationPhase, Request, Response, StopReason, VmState};
use bascule_ipc::volume::PathState;
use bascule_types::{Epoch, Lba};

const SOON: Duration = Duration::from_secs(60);

/// Waits until the guest's disk has made no progress for a while of guest time.
fn wait_standstill(session: &mut Session, console: &Console) {
    wait_for("the disk to stand still", SOON, || {
        let before = session.report()?.disk_ack;
        console.wait_ticks(50, SOON)?;
        Ok((session.report()?.disk_ack == before).then_some(()))
    })
    .unwrap();
}

fn wait_progress(session: &mut Session) {
    let before = session.clean_report().unwrap().disk_ack;
    wait_for("the disk to go on", SOON, || {
        Ok((session.clean_report()?.disk_ack > before).then_some(()))
    })
    .unwrap();
}

fn refusal(vm: &mut TestVm, request: &Request) -> String {
    match vm.ask(request).unwrap() {
        Response::Refused { reason } => reason,
        other => panic!("{request:?} was answered by {other:?}"),
    }
}

/// Regression: the VM's control thread used to wait for the disk, so that every status request hung
/// with the device.
#[test]
fn a_hanging_disk_blocks_no_status_request_and_is_named_as_pending() {
    if !kvm_or_skip("a_hanging_disk_blocks_no_status_request_and_is_named_as_pending") {
        return;
    }
    let disk = HangingDisk::new(16).unwrap();
    let network = Network::new().unwrap();
    let run_dir = tempfile::tempdir().unwrap();
    let spec = TestVmSpec::probe()
        .unwrap()
        .with_options(&format!("ip={GUEST}/24 disk_ms=0 disk_slots=64 tick_ms=5"))
        .with_disk(&disk.path())
        .with_interface(&network.tap().unwrap());
    let mut vm = TestVm::start(&network, run_dir.path(), &spec).unwrap();
    let console = Console::new();
    console.follow(vm.console().unwrap()).unwrap();
    let mut session = Session::open(&network, GUEST, SOON).unwrap();
    wait_progress(&mut session);
    assert_eq!(vm.waits_for().unwrap(), None);

    // A pending pause is reported, and completes when the device is back.
    let hanging = disk.hang().unwrap();
    wait_standstill(&mut session, &console);
    vm.must(&Request::Pause).unwrap();
    assert_eq!(vm.status().unwrap().state, VmState::Running);
    let waits = vm.waits_for().unwrap().unwrap();
    assert!(waits.contains("disk \"data\""), "{waits}");
    let reason = refusal(&mut vm, &Request::Resume);
    assert!(
        reason.contains("being paused") && reason.contains(&waits),
        "{reason}"
    );
    drop(hanging);
    vm.wait_state(&VmState::Paused, SOON).unwrap();
    assert_eq!(vm.waits_for().unwrap(), None);
    vm.must(&Request::Resume).unwrap();
    wait_progress(&mut session);
    console.check().unwrap();

    // A stop waits as well: a pending write may still land.
    let hanging = disk.hang().unwrap();
    wait_standstill(&mut session, &console);
    vm.must(&Request::Stop).unwrap();
    vm.reconnect().unwrap();
    assert_eq!(vm.status().unwrap().state, VmState::Running);
    let waits = vm.waits_for().unwrap().unwrap();
    assert!(waits.contains("disk \"data\""), "{waits}");
    refusal(&mut vm, &Request::Exit);
    drop(hanging);
    assert_eq!(vm.wait_stopped(SOON).unwrap(), StopReason::Requested);
    assert!(vm.exit(SOON).unwrap().success());
}

/// Regression: one guest's failed write stalled every guest of its node until an administrator had ended a
/// process, and the guest itself had no disk until then.
#[test]
fn a_failed_disk_write_is_its_guests_error_alone_and_keeps_that_guest_on_its_node() {
    if !kvm_or_skip(
        "a_failed_disk_write_is_its_guests_error_alone_and_keeps_that_guest_on_its_node",
    ) {
        return;
    }
    let lab = TwoNodes::new("tick_ms=5").unwrap();
    let mut failing = lab.boot(&lab.vm).unwrap();
    let spec = TestVmSpec::probe()
        .unwrap()
        .with_options("disk_ms=0 disk_slots=64 tick_ms=5");
    let other = lab.cluster.install(&lab.nodes[0], spec, 16).unwrap();
    let mut other = lab.cluster.boot(&lab.nodes[0], &other, Epoch(0)).unwrap();
    let console = Console::new();
    console.follow(other.console().unwrap()).unwrap();

    failing
        .vm
        .fail_writes(Lba(1).lba_to_bytes().unwrap().0)
        .unwrap();
    wait_for("the guest to see an error", SOON, || {
        Ok((failing.session.report()?.disk_errors > 0).then_some(()))
    })
    .unwrap();

    // The other guest does not notice.
    let before = console.disk_ack();
    wait_for("the other VM to write on", SOON, || {
        Ok((console.disk_ack() > before).then_some(()))
    })
    .unwrap();
    console.check().unwrap();
    assert!(!other.status().unwrap().io_stalled);
    for node in &lab.nodes {
        assert_eq!(node.status().unwrap().path, PathState::Direct);
    }

    // This one goes on when its writes succeed again.
    failing.vm.fail_writes(u64::MAX).unwrap();
    let before = failing.session.report().unwrap().disk_ack;
    wait_for("the guest to write again", SOON, || {
        Ok((failing.session.report()?.disk_ack > before).then_some(()))
    })
    .unwrap();

    // The write that failed may still land: the guest stays.
    let limits = MigrationLimits {
        downtime_ms_max: 1000,
        ..MigrationLimits::default()
    };
    let (_destination, _) = lab.begin(&mut failing, &lab.vm, limits).unwrap();
    let outcome = failing.vm.wait_migration(SOON).unwrap();
    assert_eq!(outcome.phase, MigrationPhase::Failed, "{outcome:?}");
    let failure = outcome.failure.unwrap();
    assert!(failure.contains("may still land"), "{failure}");
    assert_eq!(failing.vm.status().unwrap().state, VmState::Running);
    assert_eq!(lab.epoch().unwrap(), Epoch(1), "nothing was transferred");
    failing.vm.must(&Request::Stop).unwrap();
    let stopped = failing.vm.wait_stopped(SOON).unwrap();
    assert_eq!(stopped, StopReason::Requested);
    let owner = Some(lab.nodes[0].owner().unwrap());
    let rows = lab.nodes[0].rows().unwrap();
    assert!(rows.vms.iter().all(|row| row.owner == owner), "{rows:?}");
}
