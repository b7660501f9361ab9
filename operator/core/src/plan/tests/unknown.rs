//! What is said while nothing is known: after a change of leader, and when no node responds.

use super::*;
use crate::Reported;

/// The guest ran on node-1 when the last leader looked; this one has no report yet.
fn new_leader() -> Case {
    let mut case = Case::running_on(1);
    case.observed.row = Fact::Unknown;
    case.observed.processes.clear();
    for slot in 0..3 {
        let node = case.node(&format!("node-{slot}"));
        node.stream = Stream::Unknown;
        node.access = Fact::Unknown;
    }
    case.volume().peers.clear();
    case.observed.memory.reported = Some(Reported {
        phase: Phase::Running,
        node: Some("node-1".to_owned()),
    });
    case
}

/// The status was overwritten with Unknown whenever another replica took the Lease.
#[test]
fn a_new_leader_leaves_the_status_alone_until_the_nodes_have_reported() {
    let mut case = new_leader();
    let plan = case.plan();
    assert_eq!(plan.actions, []);
    assert!(plan.report.keep);
    assert_eq!(plan.report.unknown_since, Some(NOW));

    // One node reports, but not the one that owns the guest.
    let whole = Case::running_on(1);
    case.observed.row = whole.observed.row.clone();
    case.observed
        .nodes
        .insert("node-0".to_owned(), whole.observed.nodes["node-0"].clone());
    case.observed.volume = whole.observed.volume.clone();
    assert!(case.plan().report.keep);

    case.observed.nodes = whole.observed.nodes.clone();
    case.observed.processes = whole.observed.processes.clone();
    let report = case.plan().report;
    assert!(!report.keep);
    assert_eq!((report.phase, report.unknown_since), (Phase::Running, None));
}

#[test]
fn a_lasting_outage_is_reported_with_the_node_that_was_known_last() {
    let mut case = new_leader();
    case.observed.memory.unknown_since = Some(NOW);
    case.now = NOW.after(Duration::from_secs(30));
    let report = case.plan().report;
    assert!(!report.keep);
    assert_eq!(report.unknown_since, Some(NOW));
    assert_eq!(report.phase, Phase::Unknown);
    assert_eq!(report.node.as_deref(), Some("node-1"));
    assert_eq!(
        (report.ready.status, report.ready.reason),
        (None, reason::VOLUME_UNAVAILABLE)
    );
    assert_eq!(report.protected.status, None);
}

#[test]
fn a_vm_that_never_ran_reports_immediately_that_no_node_reaches_its_volume() {
    let mut case = new_leader();
    case.observed.memory.reported = None;
    let report = case.plan().report;
    assert!(!report.keep);
    assert_eq!(
        (report.phase, report.ready.status, report.ready.reason),
        (Phase::Pending, Some(false), reason::VOLUME_UNAVAILABLE)
    );
}

#[test]
fn a_backing_device_that_is_gone_on_all_nodes_is_news_and_names_the_reason() {
    let mut case = Case::running_on(1);
    case.observed.row = Fact::Unknown;
    case.observed.memory.reported = Some(Reported {
        phase: Phase::Running,
        node: Some("node-1".to_owned()),
    });
    for slot in 0..3 {
        let access = case.access(&format!("node-{slot}"));
        access.path = PathState::Unavailable;
        access.reason = Some("/dev/disk/by-id/lun: no such device".to_owned());
    }
    let report = case.plan().report;
    assert!(!report.keep);
    assert_eq!(report.ready.reason, reason::STORAGE_LOST);
    assert!(
        report.ready.message.contains("node-2: /dev/disk/by-id/lun"),
        "{}",
        report.ready.message
    );
    assert_eq!(report.node.as_deref(), Some("node-1"));
}

#[test]
fn an_isolated_guest_keeps_its_protection() {
    let mut case = Case::running_on(1);
    case.node("node-1").stream = Stream::Down { since: NOW };
    let report = case.plan().report;
    assert_eq!(report.ready.reason, reason::NODE_UNREACHABLE);
    assert_eq!(
        (report.protected.status, report.protected.reason),
        (Some(true), reason::PROTECTED)
    );
}
