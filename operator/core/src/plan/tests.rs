//! Decisions, one sentence each. [`Case`] is a cluster of three healthy nodes on which a test says
//! what is different.

mod bad_input;
mod case;
mod deletion;
mod moves;
mod unknown;

use std::time::Duration;

use bascule_api::names::reason;
use bascule_ipc::vm::{MigrationPhase as Copy, StopReason, VmState};
use bascule_ipc::volume::{FencingMode, PathState, WatchdogKind};
use bascule_types::Epoch;
use bascule_volume_format::change::{Change, MissingProof, Refusal};
use proptest::prelude::*;

use self::case::{Case, NOW, node_owner};
use crate::MigrationPhase;
use crate::{
    Action, DrainPolicy, Fact, FailoverUpdate, FailurePolicy, MigrationMode, Phase, PodPhase,
    Purpose, RunPolicy, Stream,
};

// ---- life --------------------------------------------------------------------------------------

#[test]
fn the_finalizer_comes_first() {
    let mut case = Case::new();
    case.intent.finalizer = false;
    assert_eq!(case.plan().actions, [Action::AddFinalizer]);
}

#[test]
fn a_missing_volume_is_named() {
    let mut case = Case::new();
    case.observed.volume = Fact::Absent;
    let plan = case.plan();
    assert_eq!(plan.report.ready.reason, reason::VOLUME_MISSING);
    assert!(plan.report.ready.message.contains("san"));
    assert_eq!(plan.actions, []);
}

#[test]
fn a_row_is_created_only_when_it_is_certain_that_there_is_none() {
    let mut case = Case::new();
    case.observed.row = Fact::Unknown;
    assert_eq!(case.plan().actions, []);
    case.observed.row = Fact::Absent;
    assert!(matches!(&case.changes()[..], [Change::CreateVm { .. }]));
}

#[test]
fn an_unowned_virtual_machine_asks_the_scheduler_first() {
    let plan = Case::new().plan();
    assert!(matches!(
        &plan.actions[..],
        [Action::CreateReservation {
            purpose: Purpose::Current,
            pin: None,
            ..
        }]
    ));
    assert_eq!(plan.report.phase, Phase::Pending);
}

#[test]
fn nodes_that_cannot_run_it_are_avoided() {
    let mut case = Case::new();
    case.node("node-1").kvm_error = Some("/dev/kvm is missing".to_owned());
    case.node("node-2").access = None;
    let plan = case.plan();
    let [Action::CreateReservation { avoid, .. }] = &plan.actions[..] else {
        panic!("{:?}", plan.actions)
    };
    assert_eq!(avoid, &["node-1", "node-2"]);
}

#[test]
fn a_bound_reservation_is_followed_by_acquire_then_start() {
    let mut case = Case::new().with_pod("node-1");
    let owner = node_owner(1);
    assert!(matches!(
        &case.changes()[..],
        [Change::Acquire { expected_epoch: Epoch(4), to, .. }] if *to == owner
    ));
    case = case.owned_by(1);
    assert!(case.plan().actions.contains(&Action::StartVm {
        node: "node-1".to_owned(),
        owner,
        epoch: Epoch(5),
        restore: false,
    }));
}

#[test]
fn memory_larger_than_any_node_is_pending_with_the_schedulers_words() {
    let mut case = Case::new().with_pod("node-1");
    let pod = case.pod(0);
    pod.node = None;
    pod.phase = PodPhase::Pending;
    pod.unschedulable = Some("0/3 nodes are available: 3 Insufficient memory.".to_owned());
    let report = case.plan().report;
    assert_eq!(
        (report.phase, report.ready.reason),
        (Phase::Pending, reason::UNSCHEDULABLE)
    );
    assert!(report.ready.message.contains("Insufficient memory"));
}

#[test]
fn an_owner_without_process_gives_the_row_up_when_the_reservation_is_elsewhere() {
    let case = Case::new().owned_by(0).with_pod("node-1");
    assert!(matches!(&case.changes()[..], [Change::Release { .. }]));
}

#[test]
fn a_running_guest_in_its_place_needs_nothing() {
    let plan = Case::running_on(1).plan();
    assert_eq!(plan.actions, []);
    assert_eq!(plan.report.phase, Phase::Running);
    assert_eq!(plan.report.ready.status, Some(true));
    assert_eq!(plan.report.node.as_deref(), Some("node-1"));
}

#[test]
fn nothing_is_done_while_the_api_is_away() {
    let mut case = Case::running_on(1);
    case.observed.pods = Fact::Unknown;
    assert_eq!(case.plan().actions, []);
}

#[test]
fn stop_presses_the_power_button_and_forces_off_after_the_grace() {
    let mut case = Case::running_on(1);
    case.intent.run = RunPolicy::Stopped;
    let plan = case.plan();
    assert!(plan.actions.contains(&Action::PowerButton {
        node: "node-1".to_owned()
    }));
    assert_eq!(plan.report.stopping_since, Some(NOW));
    assert_eq!(plan.report.phase, Phase::Stopping);

    case.observed.history.stopping_since = Some(NOW);
    case.observed.history.power_button = Some(NOW);
    case.now = NOW.after(Duration::from_secs(2));
    assert_eq!(case.plan().actions, [], "one press is enough for now");
    case.now = NOW.after(case.intent.budgets.shutdown);
    assert!(case.plan().actions.contains(&Action::StopVm {
        node: "node-1".to_owned()
    }));
}

#[test]
fn a_guest_that_shuts_itself_down_stays_down_only_on_failure_policy() {
    let mut case = Case::running_on(1).process_is(VmState::Stopped(StopReason::GuestShutdown));
    case.row().owner = None;
    case.intent.run = RunPolicy::OnFailure;
    let report = case.plan().report;
    assert!(report.completed);
    assert_eq!(
        (report.phase, report.ready.reason),
        (Phase::Stopped, reason::GUEST_SHUT_DOWN)
    );

    case.intent.run = RunPolicy::Always;
    let report = case.plan().report;
    assert!(!report.completed);
    assert_eq!(report.restarts, [NOW]);
}

#[test]
fn a_guest_that_keeps_failing_waits_longer_and_then_gives_up() {
    let fault = StopReason::GuestFault {
        what: "triple fault".to_owned(),
    };
    let mut case = Case::running_on(1).process_is(VmState::Stopped(fault));
    case.row().owner = None;
    case.observed.history.restarts = vec![NOW];
    let plan = case.plan();
    assert_eq!(plan.report.ready.reason, reason::BACKING_OFF);
    assert!(plan.report.ready.message.contains("triple fault"));
    assert!(plan.actions.is_empty(), "{:?}", plan.actions);

    case.observed.history.restarts = vec![NOW; case.intent.restart.attempts_max];
    assert_eq!(case.plan().report.ready.reason, reason::RESTARTS_EXHAUSTED);
}

#[test]
fn a_killed_process_is_collected_and_started_again_in_the_same_tenure() {
    let mut case = Case::running_on(1);
    case.observed.processes[0].alive = false;
    let actions = case.plan().actions;
    assert!(actions.contains(&Action::CollectVm {
        node: "node-1".to_owned(),
        pid: 100
    }));
    assert!(actions.iter().any(|a| matches!(
        a,
        Action::StartVm {
            epoch: Epoch(5),
            ..
        }
    )));
}

#[test]
fn a_guest_reboot_costs_no_restart() {
    let mut case = Case::running_on(1).process_is(VmState::Stopped(StopReason::GuestReset));
    case.row().owner = None;
    let plan = case.plan();
    assert_eq!(plan.report.restarts, []);
    assert!(
        plan.actions
            .iter()
            .any(|a| matches!(a, Action::CollectVm { .. }))
    );
}

// ---- reservations ------------------------------------------------------------------------------

#[test]
fn a_vanished_reservation_is_made_again_where_the_guest_is() {
    let mut case = Case::running_on(1);
    case.observed.pods = Fact::Known(vec![]);
    assert!(case.plan().actions.iter().any(|action| matches!(
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
    let ends = |case: &Case| {
        case.plan()
            .actions
            .iter()
            .any(|a| matches!(a, Action::EndReservation { .. }))
    };
    assert!(!ends(&case));
    case = case.owned_by(2);
    assert!(
        !ends(&case),
        "its process has not reported that it departed"
    );
    case = case.process_is(VmState::Departed);
    assert!(ends(&case));
}

// ---- drain -------------------------------------------------------------------------------------

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
    let named = case.plan().actions.iter().any(
        |a| matches!(a, Action::CreateMigration { name, .. } if name.starts_with("web-drain-")),
    );
    assert!(named);
}

// ---- migration ---------------------------------------------------------------------------------

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
    assert!(
        case.plan()
            .actions
            .iter()
            .any(|a| matches!(a, Action::MigrateQuick { .. }))
    );

    case = case.process_is(VmState::Departed).owned_by(2);
    case.row().epoch = Epoch(6);
    case.row().saved = true;
    assert!(case.plan().actions.contains(&Action::StartVm {
        node: "node-2".to_owned(),
        owner: node_owner(2),
        epoch: Epoch(6),
        restore: true,
    }));
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
        assert!(
            !case
                .plan()
                .actions
                .iter()
                .any(|a| matches!(a, Action::StopVm { .. }))
        );
    }
}

#[test]
fn cancel_asks_the_source_and_waits_for_its_word() {
    let mut case = Case::running_on(1).with_migration("go", MigrationMode::Live);
    case.begun(0);
    case.migration(0).cancel = true;
    case = case
        .with_migration_pod("go", "node-2")
        .copying(Copy::PreCopy);
    assert!(
        case.plan()
            .actions
            .iter()
            .any(|a| matches!(a, Action::CancelMigration { .. }))
    );
    assert_eq!(case.migration_end("go"), None);
    case = case.copying(Copy::Cancelled);
    let expected = Some((MigrationPhase::Cancelled, reason::CANCELLED));
    assert_eq!(case.migration_end("go"), expected);
}

#[test]
fn a_committed_migration_succeeds_when_the_guest_runs_on_its_target() {
    let mut case = Case::running_on(1).with_migration("go", MigrationMode::Live);
    case.begun(0);
    case = case
        .with_migration_pod("go", "node-2")
        .process_is(VmState::Departed)
        .owned_by(2);
    case.row().epoch = Epoch(6);
    case = case.with_process(2, VmState::Running, Epoch(6));
    let expected = Some((MigrationPhase::Succeeded, reason::SUCCEEDED));
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

#[test]
fn an_attempt_that_a_node_refuses_fails_with_the_nodes_words() {
    let mut case = Case::running_on(1).with_migration("go", MigrationMode::Quick);
    case.begun(0);
    case = case.with_migration_pod("go", "node-2");
    let why = "no bridge lan on this node".to_owned();
    case.observed.history.move_rejected = Some((case.migration(0).attempt, NOW, why));
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
}

/// Found on emulated nodes: an attempt ended because the target's stream was lost for a second.
#[test]
fn a_target_that_is_silent_for_a_moment_is_waited_for() {
    let mut case = Case::running_on(1).with_migration("go", MigrationMode::Live);
    case.begun(0);
    case = case.with_migration_pod("go", "node-2");
    case.node("node-2").stream = Stream::Down { since: NOW };
    assert_eq!(case.migration_end("go"), None);
    case.now = NOW.after(Duration::from_secs(30));
    let expected = Some((MigrationPhase::Failed, reason::NO_TARGET));
    assert_eq!(case.migration_end("go"), expected);
}

// ---- failure -----------------------------------------------------------------------------------

#[test]
fn an_isolated_node_keeps_its_guests_and_their_reservations() {
    let mut case = Case::running_on(1);
    case.node("node-1").stream = Stream::Down { since: NOW };
    case.now = NOW.after(Duration::from_secs(3600));
    let plan = case.plan();
    assert_eq!(plan.actions, []);
    assert_eq!(plan.report.ready.reason, reason::NODE_UNREACHABLE);
}

#[test]
fn a_node_that_lost_its_storage_is_not_taken_over() {
    let plan = Case::running_on(1).heartbeat(1, false).plan();
    assert_eq!(plan.actions, []);
    assert_eq!(plan.report.ready.reason, reason::STORAGE_LOST);
}

#[test]
fn a_silent_kubelet_changes_nothing() {
    let mut case = Case::running_on(1);
    case.node("node-1").kubelet_ready = Fact::Known(false);
    assert_eq!(case.plan().actions, []);
}

#[test]
fn a_silent_node_is_recorded_and_the_volume_asked_until_it_grants() {
    let mut case = Case::running_on(1).silent(1);
    let actions = case.plan().actions;
    assert!(actions.iter().any(|a| matches!(
        a,
        Action::CreateFailover {
            epoch: Epoch(5),
            ..
        }
    )));
    assert!(actions.iter().any(|action| matches!(
        action,
        Action::CreateReservation { avoid, pin: None, .. } if avoid.contains(&"node-1".to_owned())
    )));

    case = case.with_pod("node-2");
    let expected = node_owner(2);
    assert!(matches!(
        &case.changes()[..],
        [Change::TakeOver { to, epoch: Epoch(5), .. }] if *to == expected
    ));
    assert!(
        !case
            .plan()
            .actions
            .iter()
            .any(|a| matches!(a, Action::StartVm { .. }))
    );
}

#[test]
fn a_takeover_that_waits_for_a_person_says_so() {
    let mut case = Case::running_on(1).silent(1).with_pod("node-2");
    case.observed.history.takeover_refusal = Some(Refusal::NotFenced {
        victim: node_owner(1),
        missing: MissingProof::AdministratorsWord,
    });
    let report = case.plan().report;
    assert_eq!(report.phase, Phase::FailingOver);
    assert_eq!(report.ready.reason, reason::WAITING_FOR_CONFIRMATION);
}

#[test]
fn policy_leave_waits_for_the_node() {
    let mut case = Case::running_on(1).silent(1);
    case.intent.on_failure = FailurePolicy::Leave;
    assert_eq!(case.plan().actions, []);
}

#[test]
fn a_node_that_comes_back_in_time_closes_the_record() {
    let case = Case::running_on(1).with_failover(Epoch(5));
    assert!(matches!(
        &case.plan().actions[..],
        [Action::ReportFailover {
            update: FailoverUpdate::Withdrawn { .. },
            ..
        }]
    ));
}

#[test]
fn a_takeover_is_on_record_with_its_proof_once_the_guest_runs() {
    let mut case = Case::running_on(2).with_failover(Epoch(4)).fenced(1);
    case.observed.processes[0].status.epoch = Epoch(5);
    let actions = case.plan().actions;
    assert!(
        actions.iter().any(|action| matches!(
            action,
            Action::ReportFailover {
                update: FailoverUpdate::Succeeded {
                    proof: Some(_),
                    epoch: Epoch(5),
                    ..
                },
                ..
            }
        )),
        "{actions:?}"
    );
}

// ---- protection --------------------------------------------------------------------------------

#[test]
fn i8_every_unprotected_virtual_machine_says_why() {
    let check = |what: fn(&mut Case), expected| {
        let mut case = Case::running_on(1);
        what(&mut case);
        let protected = case.plan().report.protected;
        assert_eq!(
            (protected.status, protected.reason),
            (Some(false), expected)
        );
        assert!(!protected.message.is_empty());
    };
    check(
        |case| case.intent.on_failure = FailurePolicy::Leave,
        reason::POLICY_LEAVE,
    );
    check(|case| case.volume().file = true, reason::FILE_BACKING);
    check(
        |case| case.volume().fencing = FencingMode::LeaseOnly,
        reason::FENCING_MANUAL,
    );
    check(
        |case| case.access("node-1").watchdog = WatchdogKind::None,
        reason::NO_WATCHDOG,
    );
    check(
        |case| {
            case.access("node-0").path = PathState::Unavailable;
            case.node("node-2").kvm_error = Some("no /dev/kvm".to_owned());
        },
        reason::NO_OTHER_NODE,
    );
    check(|case| case.observed.row = Fact::Absent, reason::NOT_RUNNING);
    let protected = Case::running_on(1).plan().report.protected;
    assert_eq!(
        (protected.status, protected.reason),
        (Some(true), reason::PROTECTED)
    );
}

// ---- deletion ----------------------------------------------------------------------------------

// ---- import ------------------------------------------------------------------------------------

#[test]
fn images_are_on_the_volume_before_the_guest_starts() {
    let mut case = Case::new().owned_by(1).with_pod("node-1").with_disks();
    case.row().disks.clear();
    assert_eq!(case.changes().len(), 3, "one CreateDisk each");
    assert!(
        case.changes()
            .iter()
            .all(|c| matches!(c, Change::CreateDisk { .. }))
    );
    assert!(
        !case
            .plan()
            .actions
            .iter()
            .any(|a| matches!(a, Action::StartVm { .. }))
    );

    case = case.with_disks();
    case.row().disks[0].importing = true;
    let actions = case.plan().actions;
    assert!(
        actions.iter().any(|a| matches!(a, Action::Import { .. })),
        "{actions:?}"
    );
    assert_eq!(case.plan().report.phase, Phase::Importing);
}

// ---- properties --------------------------------------------------------------------------------

proptest! {
    /// Whatever is known or not, no plan starts a guest that its row does not give to that node, and
    /// none acts on a row that nobody could read.
    #[test]
    fn no_plan_starts_a_guest_without_its_row(
        owner in proptest::option::of(0_u16..3),
        pod in proptest::option::of(0_u16..3),
        down in proptest::collection::vec(any::<bool>(), 3),
        silent in proptest::collection::vec(any::<bool>(), 3),
        known in any::<bool>(),
        draining in any::<bool>(),
    ) {
        let mut case = Case::new();
        if let Some(owner) = owner {
            case = case.owned_by(owner);
        }
        if let Some(pod) = pod {
            case = case.with_pod(&format!("node-{pod}"));
        }
        for slot in 0..3_u16 {
            if down[usize::from(slot)] {
                case.node(&format!("node-{slot}")).stream = Stream::Down { since: NOW };
            }
            case = case.heartbeat(slot, !silent[usize::from(slot)]);
        }
        if draining && pod.is_some() {
            case = case.draining();
        }
        if !known {
            case.observed.row = Fact::Unknown;
        }
        let actions = case.plan().actions;
        prop_assert!(known || actions.is_empty());
        for action in actions {
            if let Action::StartVm { node, owner: given, .. } = action {
                prop_assert_eq!(owner.map(node_owner), Some(given));
                prop_assert_eq!(owner.map(|slot| format!("node-{slot}")), Some(node));
            }
        }
    }
}
