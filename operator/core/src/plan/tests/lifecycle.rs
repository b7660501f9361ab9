//! From creation to running, and stopping: no node is lost.

use super::*;
use bascule_crds::OnError;
use bascule_ipc::vm::{DiskError, Panic, PanicStatus};

use crate::observed::SavedView;

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
fn an_unowned_virtual_machine_is_scheduled_before_it_is_acquired() {
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
    case.node("node-2").access = Fact::Absent;
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
fn nothing_is_done_while_the_api_server_is_unreachable() {
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

    case.observed.memory.stopping_since = Some(NOW);
    case.observed.memory.power_button = Some(NOW);
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
    case.observed.memory.restarts = vec![NOW];
    let plan = case.plan();
    assert_eq!(plan.report.ready.reason, reason::BACKING_OFF);
    assert!(plan.report.ready.message.contains("triple fault"));
    assert!(plan.actions.is_empty(), "{:?}", plan.actions);

    case.observed.memory.restarts = vec![NOW; case.intent.restart.attempts_max];
    assert_eq!(case.plan().report.ready.reason, reason::RESTARTS_EXHAUSTED);
}

/// It used to be started again in the same epoch, in which writes of the killed process may be under way.
#[test]
fn i1_a_killed_process_gives_its_epoch_up_before_the_guest_starts_again() {
    let mut case = Case::running_on(1);
    case.observed.processes[0].alive = false;
    // Neither collected nor counted as a restart before the volume has taken the ownership back.
    let plan = case.plan();
    assert!(
        matches!(
            &plan.actions[..],
            [Action::Change {
                change: Change::Release {
                    epoch: Epoch(5),
                    ..
                },
                ..
            }]
        ),
        "{:?}",
        plan.actions
    );
    assert_eq!(plan.report.restarts, []);

    case.row().owner = None;
    let plan = case.plan();
    assert_eq!(plan.report.restarts, [NOW]);
    let (node, pid) = ("node-1".to_owned(), 100);
    assert!(plan.actions.contains(&Action::CollectVm { node, pid }));
    assert!(matches!(
        &case.changes()[..],
        [Change::Acquire {
            expected_epoch: Epoch(5),
            ..
        }]
    ));
}

#[test]
fn a_process_that_ended_before_it_restored_the_guest_is_started_again_in_its_epoch() {
    let mut case = Case::running_on(1);
    case.observed.processes[0].alive = false;
    case.row().saved = Some(SavedView {
        epoch: Epoch(4),
        complete: true,
    });
    let starts = |a: &Action| matches!(a, Action::StartVm { restore: true, .. });
    assert!(case.plans(starts), "{:?}", case.plan().actions);
}

/// Its machine is reset in its process: there is nothing to do.
#[test]
fn a_guest_that_resets_itself_in_a_loop_is_not_restarted_and_says_so() {
    let mut case = Case::running_on(1);
    let resets = &mut case.observed.processes[0].status.resets;
    resets.count = 8;
    resets.waits = Some("4 s before its next reset: the guest has reset itself".to_owned());
    let plan = case.plan();
    assert_eq!((plan.actions, plan.report.restarts), (vec![], vec![]));
    let ready = plan.report.ready;
    assert_eq!(
        (ready.status, ready.reason),
        (Some(false), reason::GUEST_RESETS)
    );
    let expected =
        "the guest on node-1 waits 4 s before its next reset: the guest has reset itself";
    assert_eq!(ready.message, expected);

    case.observed.processes[0].status.resets.waits = None;
    let plan = case.plan();
    assert_eq!(
        (plan.actions, plan.report.ready.reason),
        (vec![], reason::RUNNING)
    );
}

/// `spec.onPanic: Leave`, or the moment before a reset.
#[test]
fn a_guest_that_has_panicked_is_not_ready_and_says_so_once() {
    let mut case = Case::running_on(1);
    let panicked = |case: &mut Case, count, present| {
        case.observed.processes[0].status.panics = PanicStatus { count, present };
        case.plan()
    };
    let events = |plan: &crate::Plan| -> Vec<String> {
        let actions = plan.actions.iter().map(|action| match action {
            Action::Event {
                reason: reason::GUEST_PANICKED,
                message,
                warning: true,
            } => message.clone(),
            other => panic!("{other:?}"),
        });
        actions.collect()
    };
    let plan = panicked(&mut case, 1, Some(Panic::Panicked));
    let said = "the kernel of the guest on node-1 has panicked";
    assert_eq!(events(&plan), [said]);
    assert_eq!((plan.report.panics, plan.report.new_panics), (1, 1));
    let ready = plan.report.ready;
    assert_eq!(
        (ready.status, ready.reason),
        (Some(false), reason::GUEST_PANICKED)
    );
    let message = format!("{said}; kubectl bascule logs web has its last words");
    assert_eq!(
        (ready.message, plan.report.phase),
        (message, Phase::Running)
    );

    // Reported: the condition stays, without another event.
    case.observed.memory.panics = Some(1);
    let plan = panicked(&mut case, 1, Some(Panic::Panicked));
    assert_eq!(events(&plan), [""; 0]);
    assert_eq!((plan.report.panics, plan.report.new_panics), (1, 0));
    assert_eq!(plan.report.ready.reason, reason::GUEST_PANICKED);

    // It was reset by the guest's own setting, and has panicked and was reset again since the last report.
    let plan = panicked(&mut case, 2, None);
    assert_eq!(events(&plan), [format!("{said}; its machine was reset")]);
    assert_eq!(plan.report.ready.reason, reason::RUNNING);
}

#[test]
fn a_guest_with_a_crash_kernel_is_left_alone_and_says_what_it_does() {
    let mut case = Case::running_on(1);
    let present = Some(Panic::CrashLoaded);
    case.observed.processes[0].status.panics = PanicStatus { count: 1, present };
    case.observed.memory.panics = Some(1);
    let plan = case.plan();
    assert_eq!((plan.actions, plan.report.restarts), (vec![], vec![]));
    let ready = plan.report.ready;
    assert_eq!(
        (ready.status, ready.reason),
        (Some(false), reason::GUEST_PANICKED)
    );
    assert!(ready.message.contains("its crash kernel saves the memory"));
}

#[test]
fn a_guest_that_panics_in_a_loop_says_how_long_it_waits() {
    let mut case = Case::running_on(1);
    case.observed.memory.panics = Some(6);
    let status = &mut case.observed.processes[0].status;
    status.resets.waits = Some("1 s before its next reset: the guest's kernel has panicked".into());
    let present = Some(Panic::Panicked);
    status.panics = PanicStatus { count: 6, present };
    let ready = case.plan().report.ready;
    assert_eq!(ready.reason, reason::GUEST_PANICKED);
    let waits =
        "the guest on node-1 waits 1 s before its next reset: the guest's kernel has panicked; ";
    assert!(ready.message.starts_with(waits), "{}", ready.message);
}

/// A process that does not answer, or has yet to receive its guest, counts none.
#[test]
fn panics_are_not_forgotten_while_the_process_of_the_guest_cannot_tell_them() {
    for state in [VmState::Starting, VmState::Incoming, VmState::InDoubt] {
        let mut case = Case::running_on(1).process_is(state);
        case.observed.memory.panics = Some(3);
        let report = case.plan().report;
        assert_eq!((report.panics, report.new_panics), (3, 0));
    }
}

/// Of a process of an earlier release, which does not reset its machine in place.
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
    assert!(!case.plans(|a| matches!(a, Action::StartVm { .. })));

    case = case.with_disks();
    case.row().disks[0].importing = true;
    let actions = case.plan().actions;
    assert!(
        actions.iter().any(|a| matches!(a, Action::Import { .. })),
        "{actions:?}"
    );
    assert_eq!(case.plan().report.phase, Phase::Importing);
}

#[test]
fn a_guest_that_is_paused_for_a_disk_error_says_so_and_runs_on_when_the_error_may_be_reported() {
    let mut case = Case::running_on(1).with_disks();
    let status = &mut case.observed.processes[0].status;
    status.state = VmState::Paused;
    let (disk, what) = ("root".to_owned(), "write failed: No space left".to_owned());
    status.disk_error = Some(DiskError { disk, what });
    let root = |case: &mut Case| {
        let mut disks = case.intent.disks.iter_mut();
        disks.find(|disk| disk.name == "root").unwrap().on_error = OnError::Pause;
    };
    root(&mut case);
    let plan = case.plan();
    assert_eq!(plan.actions, []);
    let ready = plan.report.ready;
    assert_eq!(
        (ready.status, ready.reason),
        (Some(false), reason::DISK_ERROR)
    );
    let names_both = ready.message.contains("root") && ready.message.contains("No space left");
    assert!(names_both, "{}", ready.message);

    for disk in &mut case.intent.disks {
        disk.on_error = OnError::Report;
    }
    let (node, disk) = ("node-1".to_owned(), "root".to_owned());
    assert_eq!(
        case.plan().actions,
        [Action::ReportDiskErrors { node, disk }]
    );
}
