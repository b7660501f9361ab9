//! Resets of a machine in place, with the probe guest.
#![forbid(unsafe_code)]

use std::time::Duration;

use bascule_e2e::{
    Console, GUEST, HangingDisk, Network, Session, TestVm, TestVmSpec, TwoNodes, kvm_or_skip,
    wait_for,
};
use bascule_ipc::vm::{MigrationPhase, Request, ResetCause};
use bascule_types::Epoch;

const SOON: Duration = Duration::from_secs(60);

/// Its disk is written all the time: writes are in flight at each reset.
#[test]
fn a_guest_reboots_in_its_process_and_ownership_and_can_be_moved_and_reboot_there() {
    if !kvm_or_skip(
        "a_guest_reboots_in_its_process_and_ownership_and_can_be_moved_and_reboot_there",
    ) {
        return;
    }
    let lab = TwoNodes::new("tick_ms=5 dirty=8M fill=16M").unwrap();
    let network = &lab.cluster.network;
    let mut guest = lab.boot(&lab.vm).unwrap();
    guest.reset(network, "reset", 1).unwrap();
    guest.reset(network, "fault", 2).unwrap();
    let resets = guest.vm.status().unwrap().resets;
    assert_eq!(resets.last, Some(ResetCause::TripleFault));
    guest.check().unwrap();
    assert_eq!(lab.epoch().unwrap(), Epoch(1), "the ownership is untouched");

    let outcome = lab.migrate(&mut guest).unwrap();
    assert_eq!(outcome.phase, MigrationPhase::Completed);
    guest.check().unwrap();
    assert_eq!(guest.vm.status().unwrap().resets.count, 2);
    // What it boots there is what its home volume has, and this process has never booted it.
    guest.reset(network, "reset", 3).unwrap();
    guest.check().unwrap();
    assert_eq!(lab.epoch().unwrap(), Epoch(2));
    let owner = Some(lab.nodes[1].owner().unwrap());
    assert_eq!(lab.nodes[0].rows().unwrap().vms[0].owner, owner);
    guest.vm.must(&Request::Stop).unwrap();
    guest.vm.wait_stopped(SOON).unwrap();
    assert_eq!(lab.nodes[0].rows().unwrap().vms[0].owner, None);
}

/// All of its memory is changed under the copy: the destination gets what it is then.
#[test]
fn i3_a_guest_that_reboots_during_the_pre_copy_of_its_migration_arrives() {
    if !kvm_or_skip("i3_a_guest_that_reboots_during_the_pre_copy_of_its_migration_arrives") {
        return;
    }
    let lab = TwoNodes::new("tick_ms=5 fill=16M").unwrap();
    let mut guest = lab.boot(&lab.vm).unwrap();
    wait_for("the guest to have filled its memory", SOON, || {
        Ok((guest.session.clean_report()?.mem_checked > 0).then_some(()))
    })
    .unwrap();
    let mut destination = lab.begin_slowly(&mut guest).unwrap();
    guest.reset(&lab.cluster.network, "reset", 1).unwrap();
    guest.wait_arrival(&mut destination).unwrap();
    assert_eq!(destination.status().unwrap().resets.count, 1);
    guest.check().unwrap();
}

#[test]
fn i3_a_reset_waits_for_the_writes_in_flight_of_a_hanging_disk() {
    if !kvm_or_skip("i3_a_reset_waits_for_the_writes_in_flight_of_a_hanging_disk") {
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
    session.written_report(SOON).unwrap();
    let hanging = disk.hang().unwrap();
    wait_for("a write that hangs", SOON, || {
        let before = session.report()?.disk_ack;
        console.wait_ticks(50, SOON)?;
        Ok((session.report()?.disk_ack == before).then_some(()))
    })
    .unwrap();
    let before = session.clean_report().unwrap();
    vm.must(&Request::Reset).unwrap();
    let waits = wait_for("the reset to begin", SOON, || vm.waits_for()).unwrap();
    assert!(waits.contains("disk \"data\""), "{waits}");
    assert_eq!(vm.status().unwrap().resets.count, 0);
    drop(hanging);
    let status = vm.wait_resets(1, SOON).unwrap();
    assert_eq!(status.resets.last, Some(ResetCause::Requested));
    let mut session = Session::open(&network, GUEST, SOON).unwrap();
    let report = session.written_report(SOON).unwrap();
    assert_ne!(report.boot, before.boot);
    assert!(
        report.disk_start >= before.disk_ack,
        "{before} and then {report}"
    );
}

#[test]
fn machines_of_several_vcpus_reboot_too() {
    if !kvm_or_skip("machines_of_several_vcpus_reboot_too") {
        return;
    }
    let network = Network::new().unwrap();
    for cpus in [2, 4] {
        let run_dir = tempfile::tempdir().unwrap();
        let spec = TestVmSpec::probe()
            .unwrap()
            .with_cpus(cpus)
            .with_options(&format!("ip={GUEST}/24 tick_ms=5 dirty=4M"))
            .with_interface(&network.tap().unwrap());
        let mut vm = TestVm::start(&network, run_dir.path(), &spec).unwrap();
        let mut boot = 0;
        for count in 0..3 {
            vm.wait_resets(count, SOON).unwrap();
            let mut session = Session::open(&network, GUEST, SOON).unwrap();
            let report = session.clean_report().unwrap();
            assert_ne!(report.boot, boot, "{cpus} vCPUs");
            boot = report.boot;
            session.command("reset").unwrap();
        }
        vm.wait_resets(3, SOON).unwrap();
    }
}
