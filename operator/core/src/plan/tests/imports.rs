//! Imports that fail, are killed, or are in the way of a deletion.

use bascule_types::{Bytes, DiskId, SecretKey};

use super::*;
use crate::{FailedImports, ImageSource, ImportPhase, ImportView, Origin};

/// Its kernel is to be filled by node-1, which owns it.
fn importing() -> Case {
    let mut case = Case::new().owned_by(1).with_pod("node-1").with_disks();
    case.row().disks[0].importing = true;
    case.row().disks[0].importer = Some(node_owner(1));
    case
}

fn reported(case: &mut Case, attempt: u32, phase: ImportPhase) {
    let disk = case.row().disks[0].disk;
    case.observed.imports = vec![ImportView {
        node: "node-1".to_owned(),
        disk,
        attempt,
        downloaded: Bytes(0),
        written: Bytes(0),
        phase,
    }];
}

fn failed() -> ImportPhase {
    ImportPhase::Failed {
        message: "its SHA-256 is 1".to_owned(),
        is_final: false,
    }
}

/// The number of the attempt that the plan begins.
fn begun(case: &Case) -> Option<u32> {
    case.plan().actions.iter().find_map(|action| match action {
        Action::Import { attempt, .. } => Some(*attempt),
        _ => None,
    })
}

/// Found by reading: an image of 1 GiB with a wrong hash was fetched again every 20 s.
#[test]
fn failed_attempts_are_repeated_after_growing_waits_and_by_the_next_operator_too() {
    let mut case = importing();
    let mut attempts = vec![];
    for second in 0..3 * 3600 {
        case.now = NOW.after(Duration::from_secs(second));
        let plan = case.plan();
        // All that a restarted operator knows.
        case.observed.memory = crate::PlannerMemory {
            failed_imports: plan.report.failed_imports,
            ..Default::default()
        };
        for action in plan.actions {
            if let Action::Import { attempt, .. } = action {
                attempts.push((attempt, second));
                reported(&mut case, attempt, failed());
            }
        }
    }
    let numbers: Vec<u32> = attempts.iter().map(|(attempt, _)| *attempt).collect();
    assert_eq!(numbers, (1..=12).collect::<Vec<u32>>());
    let pairs = attempts.windows(2);
    // The failure is seen one second after the attempt.
    let waits: Vec<u64> = pairs.map(|pair| pair[1].1 - pair[0].1 - 1).collect();
    assert_eq!(
        waits,
        [20, 40, 80, 160, 320, 640, 1280, 1800, 1800, 1800, 1800]
    );
}

#[test]
fn the_report_of_an_earlier_attempt_does_not_count_twice() {
    let mut case = importing();
    reported(&mut case, 1, failed());
    case.observed.memory.failed_imports = case.plan().report.failed_imports;
    case.now = NOW.after(Duration::from_secs(20));
    // Requested, and not yet in the node's report.
    for _ in 0..3 {
        assert_eq!(begun(&case), Some(2));
        case.observed.memory.failed_imports = case.plan().report.failed_imports;
    }
    reported(&mut case, 2, ImportPhase::Running);
    let plan = case.plan();
    assert_eq!(plan.actions, []);
    assert_eq!(plan.report.ready.reason, reason::IMPORTING);
    assert_eq!(plan.report.failed_imports["boot-kernel"].count, 1);
}

/// Reports are lost when a node reboots.
#[test]
fn what_the_status_says_holds_without_the_nodes_report() {
    let mut case = importing();
    let known = |next| FailedImports {
        count: 3,
        next,
        message: "its SHA-256 is 1".to_owned(),
    };
    let name = || "boot-kernel".to_owned();
    let later = NOW.after(Duration::from_secs(5));
    let memory = &mut case.observed.memory;
    memory.failed_imports.insert(name(), known(Some(later)));
    let plan = case.plan();
    assert_eq!(plan.actions, []);
    assert_eq!(plan.report.ready.reason, reason::IMPORT_FAILED);
    let message = &plan.report.ready.message;
    assert!(message.contains("failed 3 times"), "{message}");
    let memory = &mut case.observed.memory;
    memory.failed_imports.insert(name(), known(None));
    case.now = NOW.after(Duration::from_secs(86_400));
    assert_eq!(begun(&case), None);
    assert_eq!(case.plan().report.ready.reason, reason::IMAGE_REFUSED);
    // It was filled after all.
    case.row().disks[0].importing = false;
    assert!(case.plan().report.failed_imports.is_empty());
}

/// Found by reading: the deletion waited for as long as the import ran, for ever when its process was killed.
#[test]
fn a_deletion_ends_the_import_and_then_releases_the_vm() {
    let mut case = importing();
    case.intent.deleting_since = Some(NOW);
    let disk = case.row().disks[0].disk;
    let cancels = Action::CancelImport {
        node: "node-1".to_owned(),
        disk,
    };
    reported(&mut case, 1, ImportPhase::Running);
    assert!(case.plans(|action| *action == cancels));
    assert_eq!(case.changes(), [], "its process may still write");
    case.observed.imports.clear();
    assert!(!case.plans(|action| *action == cancels));
    let releases = |case: &Case| {
        let changes = case.changes();
        changes.iter().any(|c| matches!(c, Change::Release { .. }))
    };
    assert!(releases(&case));
    // The node forgets a failed one.
    reported(&mut case, 1, failed());
    assert!(case.plans(|action| *action == cancels) && releases(&case));
}

#[test]
fn the_import_of_another_vm_on_the_node_is_left_alone_and_delays_no_release() {
    let mut case = importing();
    case.intent.deleting_since = Some(NOW);
    let mut other = case.row().disks[0].clone();
    other.disk = DiskId::from_bytes([99; 16]);
    other.vm = Some(bascule_types::VmUid::from_bytes([8; 16]));
    let disk = other.disk;
    case.row().disks.push(other);
    reported(&mut case, 1, ImportPhase::Running);
    case.observed.imports[0].disk = disk;
    assert!(!case.plans(|action| matches!(action, Action::CancelImport { .. })));
    let changes = case.changes();
    assert!(
        changes.iter().any(|c| matches!(c, Change::Release { .. })),
        "{changes:?}"
    );
}

/// An action that fails ends its run.
#[test]
fn an_import_that_needs_a_secret_comes_after_those_that_do_not() {
    let mut case = importing();
    let image = |authorization_from| Origin::Image {
        size: Bytes::gib(1),
        source: ImageSource::Http {
            url: "https://images.example/a".to_owned(),
            digest: bascule_types::ImageDigest::Sha256("0".repeat(64)),
            ca_bundle: None,
            authorization_from,
        },
    };
    let secret = SecretKey {
        name: "images".to_owned(),
        key: "authorization".to_owned(),
    };
    case.intent.disks[0].origin = image(Some(secret));
    case.intent.disks[0].role = bascule_types::DiskRole::Kernel;
    case.intent.disks[1].origin = image(None);
    case.row().disks[1].importing = true;
    case.row().disks[1].importer = Some(node_owner(1));
    let fields = |case: &Case| -> Vec<String> {
        let actions = case.plan().actions;
        let field = |action: &Action| match action {
            Action::Import { field, .. } => Some(field.clone()),
            _ => None,
        };
        actions.iter().filter_map(field).collect()
    };
    assert_eq!(
        fields(&case),
        ["spec.disks[root].source", "spec.boot.kernel"]
    );
    // The control: without the Secret, they come in their order.
    case.intent.disks[0].origin = image(None);
    assert_eq!(
        fields(&case),
        ["spec.boot.kernel", "spec.disks[root].source"]
    );
}
