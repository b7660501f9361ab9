//! A reservation pod that the API server refuses, by a quota for example, is told within seconds in the
//! condition of whoever waits for it; and copies of labels are kept up to date.

use super::*;

const WHY: &str = "exceeded quota: mem, requested: requests.memory=192Mi";

fn refused(mut case: Case, purpose: Purpose, seconds_ago: u64) -> Case {
    case.observed.memory.reservation_refusal = Some(ReservationRefusal {
        purpose,
        at: Moment(NOW.0 - seconds_ago * 1000),
        reason: reason::QUOTA_EXCEEDED,
        message: WHY.to_owned(),
    });
    case
}

fn creates(case: &Case) -> bool {
    case.plans(|a| matches!(a, Action::CreateReservation { .. }))
}

/// Regression: the refusal was only logged, and the status stayed "waiting for the scheduler".
#[test]
fn a_quota_that_keeps_a_virtual_machine_from_starting_is_its_condition() {
    let case = refused(Case::new(), Purpose::Current, 1);
    let plan = case.plan();
    assert_eq!(
        (plan.report.ready.status, plan.report.ready.reason),
        (Some(false), reason::QUOTA_EXCEEDED)
    );
    assert_eq!(plan.report.ready.message, WHY);
    assert!(!creates(&case), "not every second");
    assert_eq!(plan.requeue, Duration::from_secs(4));
    assert!(creates(&refused(Case::new(), Purpose::Current, 5)));
    assert!(creates(&Case::new()));
}

#[test]
fn an_old_refusal_is_not_told_any_more() {
    let case = refused(Case::new(), Purpose::Current, 60);
    assert_eq!(case.plan().report.ready.reason, reason::SCHEDULING);
    assert!(creates(&case));
}

/// Regression: a drain tried for eight minutes and then shut the guest down, and nothing named the
/// quota.
#[test]
fn a_quota_without_room_for_a_second_reservation_is_in_the_migrations_condition() {
    let mut case = Case::running_on(1).with_migration("go", MigrationMode::Live);
    case.begun(0);
    let case = refused(case, Purpose::Migration("go".to_owned()), 5);
    let plan = case.plan();
    let reported = plan.actions.iter().position(|action| {
        matches!(action, Action::ReportMigration { name, update }
            if name == "go" && update.phase == MigrationPhase::Placing
                && update.reason == reason::QUOTA_EXCEEDED && update.message == WHY)
    });
    let created =
        (plan.actions.iter()).position(|action| matches!(action, Action::CreateReservation { .. }));
    assert!(
        reported.is_some() && reported < created,
        "an action that fails ends the run: {:?}",
        plan.actions
    );
    let ready = plan.report.ready;
    assert_eq!(ready.status, Some(true), "the guest runs on");
    assert!(ready.message.contains(WHY), "{}", ready.message);
    assert_eq!(case.migration_end("go"), None);
}

#[test]
fn a_migration_that_ran_out_of_time_names_the_quota() {
    let mut case = Case::running_on(1).with_migration("go", MigrationMode::Live);
    case.begun(0);
    case.migration(0).started = Some(Moment(NOW.0 - 400_000));
    let case = refused(case, Purpose::Migration("go".to_owned()), 1);
    let expected = Some((MigrationPhase::Failed, reason::NO_TARGET));
    assert_eq!(case.migration_end("go"), expected);
    let told = |action: &Action| matches!(action, Action::ReportMigration { update, .. } if update.message.contains(WHY));
    assert!(case.plans(told));
}

#[test]
fn a_guest_that_lost_its_reservation_to_a_quota_says_so_and_runs_on() {
    let mut case = Case::running_on(1);
    case.observed.pods = Fact::Known(vec![]);
    let lost = |a: &Action| matches!(a, Action::Event { .. });
    assert!(case.plans(lost));
    let case = refused(case, Purpose::Current, 5);
    let ready = case.plan().report.ready;
    assert_eq!((ready.status, ready.reason), (Some(true), reason::RUNNING));
    assert!(ready.message.contains(WHY), "{}", ready.message);
    assert!(creates(&case));
    assert!(!case.plans(lost), "one event for each loss");
}

#[test]
fn a_quota_that_keeps_a_lost_virtual_machine_down_is_its_condition() {
    let case = refused(Case::running_on(1).unresponsive(1), Purpose::Current, 1);
    let ready = case.plan().report.ready;
    assert_eq!(ready.reason, reason::QUOTA_EXCEEDED);
    assert!(ready.message.contains(WHY), "{}", ready.message);
}

#[test]
fn a_reservation_gets_changed_labels_last_of_all_and_not_when_it_leaves() {
    let update = |a: &Action| matches!(a, Action::UpdateReservation { .. });
    let mut case = Case::running_on(1);
    assert!(!case.plans(update), "they are up to date");
    case.pod(0).copies_current = false;
    let actions = case.plan().actions;
    assert!(update(actions.last().unwrap()), "{actions:?}");
    assert!(!case.draining().plans(update));
}

/// A tenant may label a pod as a reservation; and an operator may end before it has recorded one.
#[test]
fn a_pod_that_only_claims_to_be_a_reservation_is_deleted_after_a_minute_and_moves_nothing() {
    let running = Case::running_on(1);
    let deletes = |action: &Action| matches!(action, Action::DeleteReservation { uid, .. } if uid == "forged");
    let mut case = running.clone();
    case.observed.foreign_pods = vec![ForeignPod {
        uid: "forged".to_owned(),
        name: "web-e5-9".to_owned(),
        created: Moment(NOW.0 - 59_000),
        deleting: false,
    }];
    assert_eq!(case.plan().actions, running.plan().actions);
    assert!(case.plan().requeue <= Duration::from_secs(1));
    case.observed.foreign_pods[0].created = Moment(NOW.0 - 60_000);
    assert!(case.plans(deletes));
    let told = |action: &Action| matches!(action, Action::Event { reason, .. } if *reason == reason::FOREIGN_RESERVATION);
    assert!(case.plans(told));
    case.observed.foreign_pods[0].deleting = true;
    assert_eq!(case.plan().actions, running.plan().actions);
}

#[test]
fn a_reservation_is_not_given_the_name_of_a_pod_that_only_claims_to_be_one() {
    let name_of = |case: &Case| {
        let actions = case.plan().actions.into_iter();
        let mut names = actions.filter_map(|action| match action {
            Action::CreateReservation { name, .. } => Some(name),
            _ => None,
        });
        names.next().unwrap()
    };
    let mut case = Case::new();
    let name = name_of(&case);
    case.observed.foreign_pods = vec![ForeignPod {
        uid: "forged".to_owned(),
        name: name.clone(),
        created: NOW,
        deleting: false,
    }];
    assert_ne!(name_of(&case), name);
}
