//! Reservations, and what becomes of the guest when one goes.

use super::*;

#[test]
fn a_vanished_reservation_is_made_again_where_the_guest_is() {
    let mut case = Case::running_on(1);
    case.observed.pods = Fact::Known(vec![]);
    assert!(case.plans(|action| matches!(
        action,
        Action::CreateReservation { pin: Some(node), .. } if node == "node-1"
    )));
}

#[test]
fn a_failed_reservation_is_made_again_but_an_evicted_one_moves_the_guest() {
    let mut case = Case::running_on(1);
    case.pod(0).phase = PodPhase::Failed;
    let actions = case.plan().actions;
    assert!(
        actions
            .iter()
            .any(|a| matches!(a, Action::CreateReservation { pin: Some(_), .. }))
    );
    assert!(
        !actions
            .iter()
            .any(|a| matches!(a, Action::CreateMigration { .. }))
    );

    case.pod(0).phase = PodPhase::Evicted;
    case.pod(0).leaving_since = Some(NOW);
    let actions = case.plan().actions;
    assert!(
        actions
            .iter()
            .any(|a| matches!(a, Action::CreateMigration { .. }))
    );
    assert!(
        !actions
            .iter()
            .any(|a| matches!(a, Action::CreateReservation { .. }))
    );
}

#[test]
fn a_hold_process_is_ended_only_after_its_guest_has_left() {
    let mut case = Case::running_on(1).draining();
    let ends = |case: &Case| case.plans(|a| matches!(a, Action::EndReservation { .. }));
    assert!(!ends(&case));
    case = case.owned_by(2);
    assert!(
        !ends(&case),
        "its process has not reported that it departed"
    );
    case = case.process_is(VmState::Departed);
    assert!(ends(&case));

    // While the kubelet takes the pod away, each report would search the node's processes again.
    let uid = case.pod(0).uid.clone();
    case.observed.memory.hold_ended = Some((uid, NOW));
    assert!(!ends(&case));
    // The process may have started since.
    case.now = NOW.after(Duration::from_secs(3));
    assert!(ends(&case));
    case.now = NOW;
    case.observed.memory.hold_ended = Some(("another".to_owned(), NOW));
    assert!(ends(&case));
}

/// The kubelet takes seconds to notice the end of a process and to delete the pod.
#[test]
fn a_drain_does_not_wait_for_the_kubelet_once_the_hold_process_has_ended() {
    let departed = || {
        let case = Case::running_on(1).draining().owned_by(2);
        case.process_is(VmState::Departed)
    };
    let deletes =
        |case: &Case| case.plans(|a| matches!(a, Action::DeleteReservation { force: true, .. }));
    let ended = |mut case: Case| {
        case.observed.memory.hold_ended = Some((case.pod(0).uid.clone(), NOW));
        let node = case.observed.nodes.get_mut("node-1").unwrap();
        node.cordoned = true;
        case
    };
    assert!(deletes(&ended(departed())));
    let not_ended = |mut case: Case| {
        case.observed.memory.hold_ended = Some(("another".to_owned(), NOW));
        case
    };
    assert!(!deletes(&not_ended(ended(departed()))));
    // A migration: the scheduler might place another pod there, which the kubelet would refuse.
    let mut migrated = ended(departed());
    migrated.observed.nodes.get_mut("node-1").unwrap().cordoned = false;
    assert!(!deletes(&migrated));
    let mut starting = ended(departed());
    starting.pod(0).phase = PodPhase::Pending;
    assert!(!deletes(&starting));
    assert!(
        !deletes(&ended(Case::running_on(1).draining())),
        "it is the guest's"
    );
}

#[test]
fn a_drain_moves_the_guest_live_then_quick_then_shuts_it_down() {
    let mut case = Case::running_on(1).draining();
    assert_eq!(case.created_migration(), Some(MigrationMode::Live));

    for n in 0..3 {
        case = case.with_drain_migration(MigrationMode::Live, n, MigrationPhase::Failed);
    }
    assert_eq!(case.created_migration(), Some(MigrationMode::Quick));

    case = case.with_drain_migration(MigrationMode::Quick, 0, MigrationPhase::Failed);
    assert_eq!(case.created_migration(), None);
    assert!(case.plan().actions.contains(&Action::PowerButton {
        node: "node-1".to_owned()
    }));
}

#[test]
fn a_drain_whose_live_budget_is_spent_goes_on_with_quick() {
    let mut case = Case::running_on(1).draining();
    case.now = NOW.after(case.intent.budgets.live);
    assert_eq!(case.created_migration(), Some(MigrationMode::Quick));
    case.now = NOW.after(case.intent.budgets.live + case.intent.budgets.quick);
    assert!(case.plan().actions.contains(&Action::PowerButton {
        node: "node-1".to_owned()
    }));
}

#[test]
fn a_drain_follows_the_policy() {
    for (policy, expected) in [
        (DrainPolicy::LiveMigrate, Some(MigrationMode::Live)),
        (DrainPolicy::QuickMigrate, Some(MigrationMode::Quick)),
        (DrainPolicy::Shutdown, None),
    ] {
        let mut case = Case::running_on(1).draining();
        case.intent.on_drain = policy;
        assert_eq!(case.created_migration(), expected, "{policy:?}");
    }
}

#[test]
fn two_operators_choose_the_same_name_for_a_drains_migration() {
    let case = Case::running_on(1).draining();
    assert_eq!(case.plan().actions, case.plan().actions);
    let named = case.plans(
        |a| matches!(a, Action::CreateMigration { name, .. } if name.starts_with("web-drain-")),
    );
    assert!(named);
}
