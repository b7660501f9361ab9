//! The course of a migration, and every way in which one ends.

use super::*;

#[test]
fn bad_migrations_are_refused_with_their_reason() {
    for (target, expected) in [
        ("node-1", reason::TARGET_IS_SOURCE),
        ("node-9", reason::TARGET_UNKNOWN),
        ("node-2", reason::TARGET_CORDONED),
    ] {
        let mut case = Case::running_on(1).with_migration("go", MigrationMode::Live);
        case.migration(0).target = Some(target.to_owned());
        case.node("node-2").cordoned = true;
        assert_eq!(
            case.migration_end("go"),
            Some((MigrationPhase::Failed, expected))
        );
    }
}

#[test]
fn a_migration_of_a_stopped_virtual_machine_is_refused() {
    let mut case = Case::new().with_migration("go", MigrationMode::Live);
    case.intent.run = RunPolicy::Stopped;
    let expected = Some((MigrationPhase::Failed, reason::VM_NOT_RUNNING));
    assert_eq!(case.migration_end("go"), expected);
}

#[test]
fn a_second_migration_is_refused_while_one_runs() {
    let mut case = Case::running_on(1)
        .with_migration("first", MigrationMode::Live)
        .with_migration("second", MigrationMode::Live);
    case.begun(0);
    let expected = Some((MigrationPhase::Failed, reason::ANOTHER_MIGRATION_RUNS));
    assert_eq!(case.migration_end("second"), expected);
    assert_eq!(case.migration_end("first"), None);
}

#[test]
fn a_live_migration_places_prepares_and_then_moves() {
    let mut case = Case::running_on(1).with_migration("go", MigrationMode::Live);
    case.begun(0);
    let actions = case.plan().actions;
    assert!(
        actions.iter().any(|action| matches!(
            action,
            Action::CreateReservation { purpose: Purpose::Migration(name), avoid, .. }
                if name == "go" && avoid == &["node-1"]
        )),
        "{actions:?}"
    );

    case = case.with_migration_pod("go", "node-2");
    let actions = case.plan().actions;
    assert!(actions.iter().any(
        |a| matches!(a, Action::PrepareIncoming { node, epoch: Epoch(5), .. } if node == "node-2")
    ));

    case = case.with_incoming(2, "10.0.0.2:7000");
    let actions = case.plan().actions;
    assert!(
        actions.iter().any(|action| matches!(
            action,
            Action::MigrateLive { node, to, .. } if node == "node-1" && *to == node_owner(2)
        )),
        "{actions:?}"
    );
}

#[test]
fn a_quick_migration_is_restored_on_its_target() {
    let mut case = Case::running_on(1).with_migration("go", MigrationMode::Quick);
    case.begun(0);
    case = case.with_migration_pod("go", "node-2");
    assert!(case.plans(|a| matches!(a, Action::MigrateQuick { .. })));

    case = case.process_is(VmState::Departed).owned_by(2);
    case.row().epoch = Epoch(6);
    case.row().saved = saved(5);
    let actions = case.plan().actions;
    assert!(actions.contains(&Action::StartVm {
        node: "node-2".to_owned(),
        owner: node_owner(2),
        epoch: Epoch(6),
        restore: true,
    }));
    // The source is asked for the spec that the guest was started with.
    let collects = |a: &Action| matches!(a, Action::CollectVm { .. });
    assert!(!actions.iter().any(collects), "{actions:?}");
    case.row().saved = None;
    assert!(case.plans(collects));
}

/// Found on emulated nodes: the row had gone on, and every start failed on the old saved state.
#[test]
fn a_saved_state_of_an_earlier_epoch_is_dropped_and_the_guest_boots() {
    for (of, complete) in [(3, true), (5, false), (4, false)] {
        let mut case = Case::new().owned_by(1).with_pod("node-1");
        case.row().saved = Some(SavedView {
            epoch: Epoch(of),
            complete,
        });
        let actions = case.plan().actions;
        let starts = |restored| {
            let boots =
                |a: &Action| matches!(a, Action::StartVm { restore, .. } if *restore == restored);
            actions.iter().any(boots)
        };
        assert!(starts(false) && !starts(true), "{actions:?}");
        let dropped = [Change::DropSavedState {
            vm: case.intent.uid,
            from: node_owner(1),
            epoch: Epoch(5),
        }];
        assert_eq!(case.changes(), dropped);
    }
}

#[test]
fn a_saved_state_whose_transfer_did_not_come_is_restored_in_the_next_epoch() {
    let mut case = Case::new().owned_by(1).with_pod("node-1");
    case.row().saved = saved(5);
    assert!(matches!(&case.changes()[..], [Change::Release { .. }]));
    let actions = case.plan().actions;
    assert!(!actions.iter().any(|a| matches!(a, Action::StartVm { .. })));
}

fn saved(epoch: u64) -> Option<SavedView> {
    Some(SavedView {
        epoch: Epoch(epoch),
        complete: true,
    })
}

#[test]
fn a_failed_copy_ends_the_attempt_and_leaves_the_guest() {
    for (copy, phase, expected) in [
        (Copy::Failed, MigrationPhase::Failed, reason::FAILED),
        (
            Copy::NotConverging,
            MigrationPhase::Failed,
            reason::NOT_CONVERGING,
        ),
        (
            Copy::Cancelled,
            MigrationPhase::Cancelled,
            reason::CANCELLED,
        ),
    ] {
        let mut case = Case::running_on(1).with_migration("go", MigrationMode::Live);
        case.begun(0);
        case = case.with_migration_pod("go", "node-2").copying(copy);
        assert_eq!(case.migration_end("go"), Some((phase, expected)));
        assert!(!case.plans(|a| matches!(a, Action::StopVm { .. })));
    }
}

#[test]
fn cancel_is_sent_to_the_source_and_waits_for_its_report() {
    let mut case = Case::running_on(1).with_migration("go", MigrationMode::Live);
    case.begun(0);
    case.migration(0).cancel = true;
    case = case
        .with_migration_pod("go", "node-2")
        .copying(Copy::PreCopy);
    assert!(case.plans(|a| matches!(a, Action::CancelMigration { .. })));
    assert_eq!(case.migration_end("go"), None);
    case = case.copying(Copy::Cancelled);
    let expected = Some((MigrationPhase::Cancelled, reason::CANCELLED));
    assert_eq!(case.migration_end("go"), expected);
}

#[test]
fn a_committed_migration_succeeds_when_the_guest_runs_on_its_target() {
    let mut case = Case::running_on(1).with_migration("go", MigrationMode::Live);
    case.begun(0);
    case = case.with_migration_pod("go", "node-2").owned_by(2);
    case.row().epoch = Epoch(6);
    case = case.with_process(2, VmState::Running, Epoch(6));
    let expected = Some((MigrationPhase::Succeeded, reason::SUCCEEDED));
    // Found in the demo: the record was closed before the source had said how long the guest stood. And on native
    // nodes: its last report was older than the attempt.
    assert_eq!(case.migration_end("go"), None);
    for copy in [Copy::PreCopy, Copy::Stopping, Copy::Committing] {
        case = case.copying(copy);
        assert_eq!(case.migration_end("go"), None);
    }
    case = case.process_is(VmState::Departed).copying(Copy::Completed);
    assert_eq!(case.migration_end("go"), expected);
    case.migration(0).phase = MigrationPhase::Succeeded;
    let actions = case.plan().actions;
    assert!(
        actions
            .iter()
            .any(|a| matches!(a, Action::PromoteReservation { .. }))
    );
    assert!(
        actions
            .iter()
            .any(|a| matches!(a, Action::DeleteReservation { .. }))
    );
    assert!(
        actions
            .iter()
            .any(|a| matches!(a, Action::CollectVm { .. }))
    );
}

/// It has the epoch of its source, so it was never "of an earlier epoch" and stayed with its taps.
#[test]
fn a_failed_destination_in_the_present_epoch_is_collected() {
    let failed = VmState::Stopped(StopReason::Failed {
        what: "the guest uses an MTU of 9000 bytes, the network here has 1500".to_owned(),
    });
    let collected = |case: &Case| {
        case.plans(|a| matches!(a, Action::CollectVm { node, .. } if node == "node-2"))
    };
    let mut case = Case::running_on(1);
    let epoch = case.row().epoch;
    assert!(!collected(&case));
    let case = case.with_process(2, failed.clone(), epoch);
    assert!(collected(&case));
    // In a later epoch the row is out of date, and that guest ran.
    let case = Case::running_on(1).with_process(2, failed, Epoch(epoch.0 + 1));
    assert!(!collected(&case));
}

#[test]
fn an_attempt_that_a_node_refuses_fails_with_the_nodes_words() {
    let mut case = Case::running_on(1).with_migration("go", MigrationMode::Quick);
    case.begun(0);
    case = case.with_migration_pod("go", "node-2");
    let why = "no bridge lan on this node".to_owned();
    case.observed.memory.move_rejected = Some((case.migration(0).attempt, NOW, why));
    assert_eq!(
        case.migration_end("go"),
        None,
        "a report may still tell that it has begun"
    );
    case.now = NOW.after(Duration::from_secs(3));
    assert_eq!(
        case.migration_end("go"),
        Some((MigrationPhase::Failed, reason::FAILED))
    );
}

#[test]
fn an_attempt_without_a_target_in_time_fails() {
    let mut case = Case::running_on(1).with_migration("go", MigrationMode::Live);
    case.begun(0);
    case.now = NOW.after(case.intent.budgets.live);
    let expected = Some((MigrationPhase::Failed, reason::NO_TARGET));
    assert_eq!(case.migration_end("go"), expected);

    // And says what the scheduler says.
    case = case.with_migration_pod("go", "node-2");
    let pod = case.pod(1);
    pod.node = None;
    pod.phase = PodPhase::Pending;
    pod.unschedulable = Some("3 node(s) had untolerated taints".to_owned());
    assert_eq!(case.migration_end("go"), expected);
    let actions = format!("{:?}", case.plan().actions);
    assert!(
        actions.contains("in time: 3 node(s) had untolerated"),
        "{actions}"
    );
}

/// How an attempt ends whose reserved target has this failure, immediately and half a minute
/// later.
fn ends_with(trouble: fn(&mut Case)) -> [Option<(MigrationPhase, &'static str)>; 2] {
    let mut case = Case::running_on(1).with_migration("go", MigrationMode::Live);
    case.begun(0);
    case = case.with_migration_pod("go", "node-2");
    trouble(&mut case);
    let at_once = case.migration_end("go");
    case.observed.memory.target_lost = case.plan().report.target_lost;
    case.now = NOW.after(Duration::from_secs(30));
    [at_once, case.migration_end("go")]
}

/// Found on emulated nodes: an attempt ended because the target's stream was lost for a second, and
/// another because the volume's process there was slow to answer.
#[test]
fn a_target_that_is_in_trouble_for_a_moment_is_waited_for() {
    let expected = [None, Some((MigrationPhase::Failed, reason::NO_TARGET))];
    let unreachable: fn(&mut Case) =
        |case| case.node("node-2").stream = Stream::Down { since: NOW };
    assert_eq!(ends_with(unreachable), expected);
    assert_eq!(
        ends_with(|case| case.node("node-2").access = Fact::Unknown),
        expected
    );
    assert_eq!(
        ends_with(|case| case.access("node-2").path = PathState::Paused),
        expected
    );
    assert_eq!(
        ends_with(|case| case.access("node-2").owner = None),
        expected
    );
}

#[test]
fn a_target_that_can_never_take_the_guest_ends_the_attempt() {
    let expected = Some((MigrationPhase::Failed, reason::NO_TARGET));
    for trouble in [
        (|case| case.node("node-2").access = Fact::Absent) as fn(&mut Case),
        |case| case.node("node-2").kvm_error = Some("no /dev/kvm".to_owned()),
    ] {
        assert_eq!(ends_with(trouble)[0], expected);
    }
}

/// The time limit starts again with the next attempt, and when the target was reachable in between.
#[test]
fn the_time_limit_for_an_unreachable_target_starts_again_with_each_failure() {
    let mut case = Case::running_on(1).with_migration("go", MigrationMode::Live);
    case.begun(0);
    case = case.with_migration_pod("go", "node-2");
    assert_eq!(case.plan().report.target_lost, None);
    case.node("node-2").access = Fact::Unknown;
    case.observed.memory.target_lost = Some((AttemptId::from_bytes([42; 16]), Moment(0)));
    assert_eq!(case.migration_end("go"), None);
    let lost = case.plan().report.target_lost;
    assert_eq!(lost, Some((case.migration(0).attempt, NOW)));
}

#[test]
fn a_target_whose_volume_does_not_respond_for_a_moment_is_not_refused() {
    let mut case = Case::running_on(1).with_migration("go", MigrationMode::Live);
    case.migration(0).target = Some("node-2".to_owned());
    case.node("node-2").access = Fact::Unknown;
    assert_eq!(case.migration_end("go"), None);
    case.node("node-2").access = Fact::Absent;
    let expected = Some((MigrationPhase::Failed, reason::NO_TARGET));
    assert_eq!(case.migration_end("go"), expected);
}
