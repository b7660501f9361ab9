//! Moves, beyond their normal course.

use super::*;

fn requests_migration(case: &Case) -> bool {
    let requests_migration = |action: &Action| {
        matches!(
            action,
            Action::MigrateLive { .. } | Action::MigrateQuick { .. }
        )
    };
    case.plans(requests_migration)
}

/// A drain on a busy node logged "a migration is under way" as a failure: the source's first report
/// took longer than a few seconds, and the request was repeated.
#[test]
fn a_source_that_has_begun_gets_no_second_request_however_late_its_report() {
    for mode in [MigrationMode::Live, MigrationMode::Quick] {
        let mut case = Case::running_on(1).with_migration("go", mode);
        case.begun(0);
        case = case
            .with_migration_pod("go", "node-2")
            .with_incoming(2, "10.0.0.2:7000");
        assert!(requests_migration(&case), "{mode:?}");
        let pid = case.observed.processes[0].status.pid;
        case.observed.memory.move_begun = Some((case.migration(0).attempt, pid));
        case.now = NOW.after(Duration::from_secs(60));
        assert!(!requests_migration(&case), "{mode:?}");
    }
}

#[test]
fn a_guest_that_was_restarted_meanwhile_gets_a_new_shutdown_request() {
    let mut case = Case::running_on(1).with_migration("go", MigrationMode::Quick);
    case.begun(0);
    case = case.with_migration_pod("go", "node-2");
    let pid = case.observed.processes[0].status.pid;
    case.observed.memory.move_begun = Some((case.migration(0).attempt, pid));
    case.observed.processes[0].status.pid = pid + 1;
    assert!(requests_migration(&case));
}

#[test]
fn a_drain_goes_on_with_quick_at_once_when_the_guest_does_not_converge() {
    let mut case = Case::running_on(1).draining();
    case = case.with_drain_migration(MigrationMode::Live, 0, MigrationPhase::Pending);
    case.begun(0);
    case = case
        .with_migration_pod("web-drain-00000000-live-0", "node-2")
        .copying(Copy::NotConverging);
    let expected = Some((MigrationPhase::Failed, reason::NOT_CONVERGING));
    assert_eq!(case.migration_end("web-drain-00000000-live-0"), expected);

    case.migration(0).phase = MigrationPhase::Failed;
    case.migration(0).reason = Some(reason::NOT_CONVERGING.to_owned());
    assert_eq!(case.now, NOW, "none of its time has passed");
    assert_eq!(case.created_migration(), Some(MigrationMode::Quick));
}

#[test]
fn a_failed_live_attempt_of_a_drain_is_repeated() {
    let mut case = Case::running_on(1).draining();
    case = case.with_drain_migration(MigrationMode::Live, 0, MigrationPhase::Failed);
    case.migration(0).reason = Some(reason::FAILED.to_owned());
    assert_eq!(case.created_migration(), Some(MigrationMode::Live));
}
