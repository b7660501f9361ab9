//! Nodes that are lost, and who is protected against that.

use super::*;

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
fn an_unreachable_kubelet_changes_nothing() {
    let mut case = Case::running_on(1);
    case.node("node-1").kubelet_ready = Fact::Known(false);
    assert_eq!(case.plan().actions, []);
}

#[test]
fn a_suspect_node_is_recorded_and_the_takeover_requested_until_granted() {
    let mut case = Case::running_on(1).unresponsive(1);
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
    assert!(!case.plans(|a| matches!(a, Action::StartVm { .. })));
}

/// The coordinator was on the lost node: the record does not wait for the election of another one.
#[test]
fn a_suspect_node_is_recorded_while_no_coordinator_answers() {
    let lost = |case: Case| {
        let mut case = case.unresponsive(1);
        case.observed.row = Fact::Unknown;
        case.observed.last_owner = Some((node_owner(1), Epoch(5)));
        case
    };
    let plan = lost(Case::running_on(1)).plan();
    assert!(matches!(
        &plan.actions[..],
        [Action::Event { .. }, Action::CreateFailover { owner, epoch: Epoch(5), node, .. }]
            if *owner == node_owner(1) && node == "node-1"
    ));
    assert_eq!(plan.report.phase, Phase::FailingOver);
    assert_eq!(plan.report.ready.reason, reason::NODE_SUSPECT);

    // Once recorded, its message follows, and nothing is asked of a volume that cannot answer.
    let recorded = lost(
        Case::running_on(1)
            .with_failover(Epoch(5))
            .with_pod("node-2"),
    )
    .plan();
    assert!(matches!(
        &recorded.actions[..],
        [Action::ReportFailover {
            update: FailoverUpdate::Suspected { .. },
            ..
        }]
    ));

    // Not: a node that has not stopped, a policy that leaves the guest there, a guest that may have moved.
    let records = |case: Case| case.plans(|a| matches!(a, Action::CreateFailover { .. }));
    assert!(!records(lost(Case::running_on(1)).heartbeat(1, true)));
    let mut leave = lost(Case::running_on(1));
    leave.intent.on_failure = FailurePolicy::Leave;
    assert!(!records(leave));
    let mut moving = Case::running_on(1).with_migration("move", MigrationMode::Live);
    moving.begun(0);
    assert!(!records(lost(moving)));
}

/// A restart on the same node is a new epoch, which the record's operator may not have known.
#[test]
fn an_owner_that_began_another_epoch_by_itself_was_not_taken_over() {
    let case = Case::running_on(1).with_failover(Epoch(4));
    let ends = |such: fn(&FailoverUpdate) -> bool| {
        case.plans(|a| matches!(a, Action::ReportFailover { update, .. } if such(update)))
    };
    assert!(ends(|u| matches!(u, FailoverUpdate::Withdrawn { .. })));
    assert!(!ends(|u| matches!(u, FailoverUpdate::TakenOver { .. })));
}

#[test]
fn a_takeover_that_waits_for_a_manual_confirmation_says_so() {
    let mut case = Case::running_on(1).unresponsive(1).with_pod("node-2");
    case.observed.memory.takeover_refusal = Some(Refusal::NotFenced {
        victim: node_owner(1),
        missing: MissingProof::AdminConfirmation,
    });
    let report = case.plan().report;
    assert_eq!(report.phase, Phase::FailingOver);
    assert_eq!(report.ready.reason, reason::WAITING_FOR_CONFIRMATION);
}

#[test]
fn policy_leave_waits_for_the_node() {
    let mut case = Case::running_on(1).unresponsive(1);
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

/// A suspicion that was wrong: the guest runs on as if nothing had been, and nothing of it stays.
#[test]
fn a_withdrawn_suspicion_leaves_the_guest_alone_and_gives_the_other_reservation_back() {
    let suspected = Case::running_on(1)
        .unresponsive(1)
        .with_failover(Epoch(5))
        .with_pod("node-2");
    let other = suspected.observed.pods.known().unwrap()[1].uid.clone();
    let mut back = suspected.heartbeat(1, true);
    back.node("node-1").stream = Stream::Up;
    let plan = back.plan();
    assert!(
        matches!(
            &plan.actions[..],
            [
                Action::ReportFailover {
                    update: FailoverUpdate::Withdrawn { .. },
                    ..
                },
                Action::DeleteReservation { uid, .. },
            ] if *uid == other
        ),
        "{:?}",
        plan.actions
    );
    assert_eq!(plan.report.phase, Phase::Running);
    assert_eq!(plan.report.ready.status, Some(true));
}

/// Its lease ran out, no node took anything over, and it joined again.
#[test]
fn a_node_that_comes_back_in_its_next_generation_has_come_back() {
    let mut case = Case::running_on(1).with_failover(Epoch(5));
    let mut next = node_owner(1);
    next.generation = next.generation.next();
    case.row().owner = Some(next);
    let said = |case: &Case, words: &str| {
        case.plans(|action| {
            matches!(action, Action::ReportFailover {
                update: FailoverUpdate::Withdrawn { message }, ..
            } if message.contains(words))
        })
    };
    assert!(said(&case, "node-1 came back"));
    case.row().owner = None;
    assert!(said(&case, "node-1 gave the virtual machine up by itself"));
}

fn created_failover(case: &Case) -> Option<String> {
    let actions = case.plan().actions;
    actions.into_iter().find_map(|action| match action {
        Action::CreateFailover { name, .. } => Some(name),
        _ => None,
    })
}

#[test]
fn every_outage_in_an_epoch_has_a_failover_of_its_own() {
    let closed = |name: &str| FailoverView {
        name: name.to_owned(),
        closed: true,
        ..failover(Epoch(5))
    };
    let named = |records| {
        let case = Case::running_on(1).unresponsive(1).with_failovers(records);
        created_failover(&case)
    };
    assert_eq!(named(vec![]).as_deref(), Some("web-5"));
    assert_eq!(named(vec![closed("web-5")]).as_deref(), Some("web-5.2"));
    // The first ones are deleted in time.
    let late = vec![closed("web-5.10"), closed("web-5.9"), closed("web-50.99")];
    assert_eq!(named(late).as_deref(), Some("web-5.11"));
    assert_eq!(named(vec![closed("web-4"), failover(Epoch(5))]), None);
}

/// The record of a generation that is over is closed, and does not stand for the next one's.
#[test]
fn an_outage_of_the_next_generation_is_another_one() {
    let mut earlier = failover(Epoch(5));
    earlier.owner.generation = Generation(0);
    let case = Case::running_on(1)
        .unresponsive(1)
        .with_failovers(vec![earlier]);
    assert_eq!(created_failover(&case).as_deref(), Some("web-5.2"));
    let reports = |update: fn(&FailoverUpdate) -> bool| {
        case.plans(|a| matches!(a, Action::ReportFailover { update: u, .. } if update(u)))
    };
    assert!(reports(|u| matches!(u, FailoverUpdate::Withdrawn { .. })));
    assert!(!reports(|u| matches!(u, FailoverUpdate::Suspected { .. })));
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

#[test]
fn i8_no_guest_is_called_protected_on_a_node_whose_volume_says_nothing() {
    for access in [Fact::Unknown, Fact::Absent] {
        let mut case = Case::running_on(1);
        case.node("node-1").access = access;
        let protected = case.plan().report.protected;
        assert_eq!(
            (protected.status, protected.reason),
            (None, reason::UNKNOWN)
        );
    }
}
