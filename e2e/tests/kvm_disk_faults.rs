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
use bascule_ipc::vm::{Request, Response, StopReason, VmState};
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

/// Regression: the failure was only in that VM's log, and the node's other VMs kept writing.
#[test]
fn a_failed_disk_write_fails_the_volume_on_this_node_until_it_was_verified_and_on_no_other() {
    if !kvm_or_skip(
        "a_failed_disk_write_fails_the_volume_on_this_node_until_it_was_verified_and_on_no_other",
    ) {
        return;
    }
    let mut lab = TwoNodes::new("tick_ms=5").unwrap();
    let mut failing = lab.boot(&lab.vm).unwrap();
    let spec = TestVmSpec::probe()
        .unwrap()
        .with_options("disk_ms=0 disk_slots=64 tick_ms=5");
    let other = lab.cluster.install(&lab.nodes[0], spec, 16).unwrap();
    let mut other = lab.cluster.boot(&lab.nodes[0], &other, Epoch(0)).unwrap();
    let console = Console::new();
    console.follow(other.console().unwrap()).unwrap();
    wait_for("the other VM to write", SOON, || {
        Ok((console.disk_ack() > 0).then_some(()))
    })
    .unwrap();

    failing
        .vm
        .fail_writes(Lba(1).lba_to_bytes().unwrap().0)
        .unwrap();
    wait_for("the guest to see an error", SOON, || {
        Ok((failing.session.report()?.disk_errors > 0).then_some(()))
    })
    .unwrap();
    let status = wait_for("the volume to be failed on this node", SOON, || {
        let status = lab.nodes[0].status()?;
        Ok((status.path == PathState::Unavailable).then_some(status))
    })
    .unwrap();
    let reason = status.reason.unwrap();
    assert!(reason.contains("disk \"data\": write failed"), "{reason}");
    assert_eq!(lab.nodes[1].status().unwrap().path, PathState::Direct);

    // The other VM stalls without an I/O error.
    wait_for("the other VM to stall", SOON, || {
        Ok(other.status()?.io_stalled.then_some(()))
    })
    .unwrap();
    console.wait_ticks(20, SOON).unwrap();
    let stalled_at = console.disk_ack();
    console.wait_ticks(50, SOON).unwrap();
    assert_eq!(console.disk_ack(), stalled_at);

    // A new process verifies the volume, and the other VM continues.
    lab.nodes[0].volume_process().kill().unwrap();
    lab.cluster.restart_volume(&mut lab.nodes[0]).unwrap();
    wait_for("the other VM to go on", SOON, || {
        Ok((console.disk_ack() > stalled_at).then_some(()))
    })
    .unwrap();
    console.check().unwrap();
    assert_eq!(lab.nodes[0].status().unwrap().path, PathState::Direct);
}
