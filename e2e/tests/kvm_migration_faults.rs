//! Live migrations whose processes are killed at each phase, and quick migrations, with the probe
//! guest on two nodes of one volume.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use bascule_e2e::{
    Console, GUEST, MovableGuest, Session, TestCluster, TestVm, TestVmSpec, TwoNodes, VmOnVolume,
    kvm_or_skip, wait_for,
};
use bascule_ipc::vm::{MigrationLimits, MigrationPhase, Request, Response, StopReason, VmState};
use bascule_types::{Answer, AttemptId, Change, Epoch};

const SOON: Duration = Duration::from_secs(60);

fn lab(options: &str) -> TwoNodes {
    TwoNodes::new(&format!("tick_ms=5 {options}")).unwrap()
}

/// Starts a destination and orders the migration to it.
fn begin(lab: &TwoNodes, guest: &mut MovableGuest, vm: &VmOnVolume) -> TestVm {
    let limits = MigrationLimits {
        downtime_ms_max: 1000,
        ..MigrationLimits::default()
    };
    lab.begin(guest, vm, limits).unwrap().0
}

#[test]
fn migration_target_dies_at_each_phase_guest_unharmed() {
    if !kvm_or_skip("migration_target_dies_at_each_phase_guest_unharmed") {
        return;
    }
    let lab = lab("dirty=8M rate=8M fill=32M");
    let mut guest = lab.boot(&lab.vm).unwrap();
    for point in [
        "destination-hello",
        "destination-memory",
        "destination-round",
        "destination-state",
        "destination-restored",
    ] {
        let broken = lab.vm.with_fault(&format!("{point}=kill"));
        let mut destination = begin(&lab, &mut guest, &broken);
        let outcome = guest.vm.wait_migration(SOON).unwrap();
        assert_eq!(
            outcome.phase,
            MigrationPhase::Failed,
            "{point}: {outcome:?}"
        );
        destination.process().wait(SOON).unwrap();
        assert_eq!(
            guest.vm.status().unwrap().state,
            VmState::Running,
            "{point}"
        );
        guest.check().unwrap();
        assert_eq!(
            lab.epoch().unwrap(),
            Epoch(1),
            "{point}: nothing was transferred"
        );
    }
    let mut destination = begin(&lab, &mut guest, &lab.vm);
    let outcome = guest.vm.wait_migration(SOON).unwrap();
    assert_eq!(outcome.phase, MigrationPhase::Completed, "{outcome:?}");
    guest
        .console
        .follow(destination.console().unwrap())
        .unwrap();
    guest.check().unwrap();
}

#[test]
fn a_source_that_dies_after_the_commit_is_succeeded() {
    if !kvm_or_skip("a_source_that_dies_after_the_commit_is_succeeded") {
        return;
    }
    let lab = lab("fill=16M");
    let mut guest = lab
        .boot(&lab.vm.with_fault("source-committed=kill"))
        .unwrap();
    let mut destination = begin(&lab, &mut guest, &lab.vm);
    guest.vm.process().wait(SOON).unwrap();
    destination.wait_state(&VmState::Running, SOON).unwrap();
    guest
        .console
        .follow(destination.console().unwrap())
        .unwrap();
    guest.check().unwrap();
    assert_eq!(lab.epoch().unwrap(), Epoch(2));
    let owner = lab.nodes[0].rows().unwrap().vms[0].owner;
    assert_eq!(owner, Some(lab.nodes[1].owner().unwrap()));
}

#[test]
fn a_source_that_dies_before_the_commit_keeps_its_row() {
    if !kvm_or_skip("a_source_that_dies_before_the_commit_keeps_its_row") {
        return;
    }
    let lab = lab("fill=16M");
    let mut guest = lab.boot(&lab.vm.with_fault("source-ready=kill")).unwrap();
    let mut destination = begin(&lab, &mut guest, &lab.vm);
    guest.vm.process().wait(SOON).unwrap();
    // The destination has the whole state, but must not run: the source still owns the VM.
    wait_for("the destination to query the ownership", SOON, || {
        let phase = destination.status()?.migration.map(|status| status.phase);
        Ok((phase == Some(MigrationPhase::Committing)).then_some(()))
    })
    .unwrap();
    assert_eq!(destination.status().unwrap().state, VmState::Incoming);
    let row = lab.nodes[0].rows().unwrap().vms.remove(0);
    assert_eq!(row.owner, Some(lab.nodes[0].owner().unwrap()));
    assert_eq!(row.epoch, Epoch(1));
    // The VM is started elsewhere: the epoch rises, and the destination gives up.
    let change = Change::Release {
        vm: lab.vm.uid,
        from: lab.nodes[0].owner().unwrap(),
        epoch: Epoch(1),
    };
    wait_for("the settle time of the killed source", SOON, || {
        Ok(lab.nodes[0].change(change.clone()).ok())
    })
    .unwrap();
    let reason = destination.wait_stopped(SOON).unwrap();
    assert!(matches!(reason, StopReason::Failed { .. }), "{reason:?}");
}

#[test]
fn a_second_migration_while_one_runs_and_one_to_its_own_node_are_refused() {
    if !kvm_or_skip("a_second_migration_while_one_runs_and_one_to_its_own_node_are_refused") {
        return;
    }
    let lab = lab("fill=16M");
    let mut guest = lab.boot(&lab.vm).unwrap();
    let order = |attempt, to| Request::MigrateLive {
        attempt,
        peer: "127.0.0.1:1".parse().unwrap(),
        to,
        limits: MigrationLimits::default(),
    };
    let here = lab.nodes[0].owner().unwrap();
    let answer = guest.vm.ask(&order(AttemptId::random(), here)).unwrap();
    let Response::Refused { reason } = answer else {
        panic!("{answer:?}");
    };
    assert_eq!(reason, "the VM runs on that node already");
    let there = lab.nodes[1].owner().unwrap();
    // Slow enough to be still there when the second one is ordered.
    let slow = MigrationLimits {
        bytes_per_second_max: Some(64 << 10),
        ..MigrationLimits::default()
    };
    let (_destination, attempt) = lab.begin(&mut guest, &lab.vm, slow).unwrap();
    let answer = guest.vm.ask(&order(AttemptId::random(), there)).unwrap();
    let Response::Refused { reason } = answer else {
        panic!("{answer:?}");
    };
    assert_eq!(reason, "a migration is under way");
    // A repeated request for the same attempt, as from a new leader, is the running one.
    guest.vm.must(&order(attempt, there)).unwrap();
    guest
        .vm
        .must(&Request::CancelMigration { attempt })
        .unwrap();
    let outcome = guest.vm.wait_migration(SOON).unwrap();
    assert_eq!(outcome.phase, MigrationPhase::Cancelled, "{outcome:?}");
    guest.check().unwrap();
}

#[test]
fn quick_migration_round_trip() {
    if !kvm_or_skip("quick_migration_round_trip") {
        return;
    }
    let lab = lab("fill=32M");
    let mut guest = lab.boot(&lab.vm).unwrap();
    let before = guest.session.clean_report().unwrap();

    // There: ownership is transferred to the other node.
    lab.save(&mut guest, Some(lab.nodes[1].owner().unwrap()))
        .unwrap();
    guest.vm.wait_state(&VmState::Departed, SOON).unwrap();
    guest.vm.exit(SOON).unwrap();
    let rows = lab.nodes[1].rows().unwrap();
    assert_eq!(rows.vms[0].epoch, Epoch(2));
    assert!(rows.saved[0].complete.is_some(), "{:?}", rows.saved);
    lab.restore(&mut guest, 1, Epoch(2)).unwrap();
    guest.check().unwrap();
    let after = guest.session.clean_report().unwrap();
    assert!(after.disk_ack > before.disk_ack, "{before} {after}");
    assert!(
        lab.nodes[1].rows().unwrap().saved.is_empty(),
        "it is restored once"
    );

    // And back through a released ownership, as for a node that is rebooted.
    lab.save(&mut guest, None).unwrap();
    guest.vm.exit(SOON).unwrap();
    assert_eq!(lab.nodes[0].rows().unwrap().vms[0].owner, None);
    let acquired = lab.nodes[0]
        .change(Change::Acquire {
            vm: lab.vm.uid,
            expected_epoch: Epoch(2),
            to: lab.nodes[0].owner().unwrap(),
        })
        .unwrap();
    let Answer::Row(row) = acquired else {
        panic!("{acquired:?}");
    };
    lab.restore(&mut guest, 0, row.epoch).unwrap();
    guest.check().unwrap();
}

#[test]
fn quick_migration_without_room_never_pauses_the_guest() {
    if !kvm_or_skip("quick_migration_without_room_never_pauses_the_guest") {
        return;
    }
    let (cluster, here) = TestCluster::new(192).unwrap();
    let spec = TestVmSpec::probe()
        .unwrap()
        .with_memory_mib(256)
        .with_options(&format!("ip={GUEST}/24 disk_ms=0 disk_slots=64 tick_ms=5"));
    let vm = cluster.install(&here, spec, 16).unwrap();
    let mut running = cluster.boot(&here, &vm, Epoch(0)).unwrap();
    let console = Console::new();
    console.follow(running.console().unwrap()).unwrap();
    let mut session = Session::open(&cluster.network, GUEST, SOON).unwrap();
    let attempt = AttemptId::random();
    running
        .must(&Request::MigrateQuick { attempt, to: None })
        .unwrap();
    let outcome = running.wait_migration(SOON).unwrap();
    assert_eq!(outcome.phase, MigrationPhase::Failed);
    let failure = outcome.failure.unwrap();
    assert!(failure.contains("are needed"), "{failure}");
    console.wait_ticks(20, SOON).unwrap();
    session.count().unwrap();
    session.clean_report().unwrap();
    console.check().unwrap();
}
