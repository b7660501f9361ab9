//! Deleting a virtual machine.

use super::*;

#[test]
fn deletion_stops_the_guest_then_deletes_disks_by_their_policy_then_the_row() {
    let mut case = Case::running_on(1).with_disks();
    case.intent.deleting_since = Some(NOW);
    assert!(case.plan().actions.contains(&Action::PowerButton {
        node: "node-1".to_owned()
    }));

    case = case.process_is(VmState::Stopped(StopReason::Requested));
    case.row().owner = None;
    let deleted = case.deleted_disks();
    assert_eq!(deleted, ["boot-kernel", "scratch"], "root is kept");
    assert!(matches!(
        case.changes().last(),
        Some(Change::DeleteVm { .. })
    ));

    case.observed.row = Fact::Absent;
    case.observed.processes.clear();
    case.observed.pods = Fact::Known(vec![]);
    assert_eq!(case.plan().actions, [Action::RemoveFinalizer]);
}

#[test]
fn deletion_does_not_wait_for_a_volume_that_is_gone() {
    let mut case = Case::new();
    case.intent.deleting_since = Some(NOW);
    case.observed.volume = Fact::Absent;
    assert_eq!(case.plan().actions, [Action::RemoveFinalizer]);
}

#[test]
fn deletion_does_not_wait_for_a_volume_that_was_never_found() {
    let mut case = Case::new();
    case.intent.deleting_since = Some(NOW);
    case.observed.row = Fact::Unknown;
    case.volume().identified = false;
    assert_eq!(case.plan().actions, [Action::RemoveFinalizer]);
}

#[test]
fn deletion_waits_while_no_node_can_tell_the_owner() {
    let mut case = Case::new();
    case.intent.deleting_since = Some(NOW);
    case.observed.row = Fact::Unknown;
    assert_eq!(case.plan().actions, []);
}

/// A namespace that is being deleted loses its pods first, and waits for them before it deletes
/// anything else; the reservation waited for the guest, and the guest for a migration, which the API server no
/// longer lets anyone create there.
#[test]
fn a_guest_in_a_namespace_that_is_being_deleted_is_shut_down_and_its_pod_released() {
    let mut case = Case::running_on(1).draining();
    case.observed.memory.namespace_ending = true;
    let plan = case.plan();
    assert!(plan.actions.contains(&Action::PowerButton {
        node: "node-1".to_owned()
    }));
    assert!(
        !plan
            .actions
            .iter()
            .any(|a| matches!(a, Action::CreateMigration { .. }))
    );
    assert_eq!(plan.report.ready.reason, reason::DELETING);

    case = case.process_is(VmState::Stopped(StopReason::GuestShutdown));
    case.observed.memory.stopping_since = Some(NOW);
    let actions = case.plan().actions;
    assert!(
        actions
            .iter()
            .any(|a| matches!(a, Action::EndReservation { .. }))
    );
    assert!(
        !actions
            .iter()
            .any(|a| matches!(a, Action::CreateReservation { .. } | Action::StartVm { .. })),
        "{actions:?}"
    );
}

/// Found on a cluster: the volume refused the coordinator's node again and again, because the import had
/// failed on the other one.
#[test]
fn a_half_filled_disk_is_deleted_through_the_node_that_was_filling_it() {
    let mut case = Case::new().with_disks();
    case.intent.deleting_since = Some(NOW);
    case.row().disks[0].importing = true;
    case.row().disks[0].importer = Some(node_owner(2));
    let half_filled = case.row().disks[0].disk;
    let through = |case: &Case| {
        case.plan()
            .actions
            .into_iter()
            .find_map(|action| match action {
                Action::Change {
                    via,
                    change: Change::DeleteDisk { disk },
                } if disk == half_filled => Some(via),
                _ => None,
            })
    };
    assert_eq!(through(&case).as_deref(), Some("node-2"));
    case.node("node-2").stream = Stream::Down { since: NOW };
    assert_eq!(through(&case).as_deref(), Some("node-0"), "the coordinator");
}
