//! Invalid documents and unusable nodes: the condition's message names the field or the device.

use super::*;
use crate::{ImageSource, ImportPhase, ImportView, Origin};

#[test]
fn a_node_without_kvm_is_named_when_the_scheduler_finds_no_other() {
    let mut case = Case::new().with_pod("node-1");
    case.node("node-2").kvm_error = Some("/dev/kvm: No such file or directory".to_owned());
    let pod = case.pod(0);
    pod.node = None;
    pod.phase = PodPhase::Pending;
    pod.avoid = vec!["node-2".to_owned()];
    pod.unschedulable = Some("0/3 nodes are available.".to_owned());
    let ready = case.plan().report.ready;
    assert_eq!(ready.reason, reason::UNSCHEDULABLE);
    assert!(ready.message.contains("0/3 nodes"), "{}", ready.message);
    assert!(
        ready
            .message
            .contains("node node-2 cannot run guests: /dev/kvm"),
        "{}",
        ready.message
    );
}

#[test]
fn a_guest_is_not_started_on_a_node_without_kvm() {
    let mut case = Case::new().with_pod("node-1");
    case.node("node-1").kvm_error = Some("/dev/kvm: No such file or directory".to_owned());
    let plan = case.plan();
    assert!(
        !plan
            .actions
            .iter()
            .any(|a| matches!(a, Action::Change { .. }))
    );
    assert!(
        plan.actions
            .iter()
            .any(|a| matches!(a, Action::DeleteReservation { .. })),
        "the pod is made again so that the scheduler places it on another node"
    );
}

/// A bridge that is not allowed, a kernel that is none: the node says so, and so does the status.
#[test]
fn the_condition_has_the_nodes_reason_against_a_start() {
    let mut case = Case::new().owned_by(1).with_pod("node-1");
    let why = "node-1: interfaces[0].bridge: no bridge \"wan\" is allowed on this node";
    case.observed.memory.error = Some((reason::START_FAILED, why.to_owned()));
    let ready = case.plan().report.ready;
    assert_eq!(
        (ready.status, ready.reason, ready.message.as_str()),
        (Some(false), reason::START_FAILED, why)
    );
}

#[test]
fn a_disk_that_another_vm_claims_is_the_condition() {
    let mut case = Case::new().owned_by(1).with_pod("node-1").with_disks();
    case.row().disks[1].vm = None;
    let why = "spec.disks[root].existing.name: volume san: shop/old.root: belongs to another";
    case.observed.memory.error = Some((reason::DISK_CLAIMED, why.to_owned()));
    let plan = case.plan();
    assert_eq!(
        (plan.report.ready.reason, plan.report.ready.message.as_str()),
        (reason::DISK_CLAIMED, why)
    );
    assert!(
        !plan
            .actions
            .iter()
            .any(|a| matches!(a, Action::StartVm { .. }))
    );
}

#[test]
fn a_failed_import_names_the_field_and_the_place_that_it_should_come_from() {
    let failing = |source: ImageSource, message: &str| {
        let mut case = Case::new().owned_by(1).with_pod("node-1").with_disks();
        if let Origin::Image { source: old, .. } = &mut case.intent.disks[0].origin {
            *old = source;
        }
        case.row().disks[0].importing = true;
        let disk = case.row().disks[0].disk;
        case.observed.imports = vec![ImportView {
            node: "node-1".to_owned(),
            disk,
            attempt: 1,
            downloaded: bascule_types::Bytes(0),
            written: bascule_types::Bytes(0),
            phase: ImportPhase::Failed {
                message: message.to_owned(),
                is_final: false,
            },
        }];
        let plan = case.plan();
        assert_eq!(
            plan.actions,
            [],
            "no request per second to a server that is down"
        );
        assert_eq!(plan.report.imported.reason, reason::IMPORT_FAILED);
        assert_eq!(plan.report.ready.reason, reason::IMPORT_FAILED);
        let message = plan.report.ready.message;
        let tries = "; failed 1 time, tried again 20 s after the last";
        message.strip_suffix(tries).unwrap().to_owned()
    };
    let url = "https://images.example/vmlinuz".to_owned();
    let digest = bascule_types::ImageDigest::Sha256("0".repeat(64));
    let http = ImageSource::Http {
        url,
        digest,
        ca_bundle: None,
        authorization_from: None,
    };
    assert_eq!(
        failing(http.clone(), "http status: 404"),
        "spec.boot.kernel: https://images.example/vmlinuz: http status: 404"
    );
    assert_eq!(
        failing(http, "https://images.example/vmlinuz: its SHA-256 is 1"),
        "spec.boot.kernel: https://images.example/vmlinuz: its SHA-256 is 1"
    );
    let file = ImageSource::HostFile {
        name: "debian".to_owned(),
    };
    assert_eq!(
        failing(file, "cannot be opened"),
        "spec.boot.kernel: debian: cannot be opened"
    );
}

/// Found on a cluster: a kernel for another CPU was reported as five crashes of the guest.
#[test]
fn an_image_that_is_refused_for_good_is_reported_and_never_requested_again() {
    let mut case = Case::new().owned_by(1).with_pod("node-1").with_disks();
    case.row().disks[0].importing = true;
    case.observed.imports = vec![ImportView {
        node: "node-1".to_owned(),
        disk: case.row().disks[0].disk,
        attempt: 1,
        downloaded: bascule_types::Bytes(0),
        written: bascule_types::Bytes(0),
        phase: ImportPhase::Failed {
            message: "the kernel is a kernel for AArch64".to_owned(),
            is_final: true,
        },
    }];
    case.now = NOW.after(Duration::from_secs(86_400));
    let plan = case.plan();
    assert_eq!(plan.actions, []);
    assert_eq!(plan.report.phase, Phase::Failed);
    for condition in [&plan.report.ready, &plan.report.imported] {
        assert_eq!(condition.reason, reason::IMAGE_REFUSED);
        let message = &condition.message;
        assert!(message.contains("AArch64; not tried again"), "{message}");
    }
}
