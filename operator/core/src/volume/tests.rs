//! A volume's decisions, one sentence each.

use bascule_types::{Generation, SlotId};

use super::*;
use crate::Moment;

fn intent() -> VolumeIntent {
    VolumeIntent {
        name: "san".to_owned(),
        fencing: Some(FencingMode::Watchdog),
        initialize: true,
        volume: None,
        formatting_node: None,
        trust_taint: false,
        confirmed: vec![],
        deleting: false,
        finalizer: true,
    }
}

fn node(name: &str, slot: u16) -> NodeOnVolume {
    NodeOnVolume {
        name: name.to_owned(),
        uid: Some(NodeUid::from_bytes([u8::try_from(slot).unwrap() + 1; 16])),
        stream: Stream::Up,
        out_of_service: false,
        attached: true,
        volume: Some(VolumeId::from_bytes([3; 16])),
        path: Some(PathState::Direct),
        reason: None,
        owner: Some(Owner {
            slot: SlotId(slot),
            generation: Generation(1),
        }),
        coordinator: slot == 0,
    }
}

fn fresh(name: &str, slot: u16) -> NodeOnVolume {
    NodeOnVolume {
        attached: false,
        volume: None,
        path: None,
        owner: None,
        coordinator: false,
        ..node(name, slot)
    }
}

fn on(nodes: Vec<NodeOnVolume>) -> VolumeObserved {
    VolumeObserved {
        nodes,
        ..VolumeObserved::default()
    }
}

#[test]
fn the_formatting_node_is_recorded_before_it_formats() {
    let observed = on(vec![fresh("a", 0), fresh("b", 1)]);
    let plan = plan_volume(&intent(), &observed);
    assert_eq!(
        plan.actions,
        [VolumeAction::ChooseFormatter {
            node: "a".to_owned()
        }]
    );
    let chosen = VolumeIntent {
        formatting_node: Some("a".to_owned()),
        ..intent()
    };
    let plan = plan_volume(&chosen, &observed);
    assert_eq!(
        plan.actions,
        [VolumeAction::Format {
            node: "a".to_owned()
        }]
    );
}

#[test]
fn no_other_node_formats_in_place_of_a_chosen_node_that_is_unreachable() {
    let mut observed = on(vec![fresh("a", 0), fresh("b", 1)]);
    observed.nodes[0].stream = Stream::Down { since: Moment(0) };
    let chosen = VolumeIntent {
        formatting_node: Some("a".to_owned()),
        ..intent()
    };
    let plan = plan_volume(&chosen, &observed);
    assert_eq!(
        plan.actions,
        [VolumeAction::Attach {
            node: "b".to_owned()
        }]
    );
}

#[test]
fn a_device_that_holds_something_is_looked_at_and_its_identity_recorded() {
    let mut observed = on(vec![fresh("a", 0)]);
    observed.format = FormatState::NotBlank;
    let plan = plan_volume(&intent(), &observed);
    assert_eq!(
        plan.actions,
        [VolumeAction::Attach {
            node: "a".to_owned()
        }]
    );
    let plan = plan_volume(&intent(), &on(vec![node("a", 0)]));
    let found = VolumeId::from_bytes([3; 16]);
    assert!(
        plan.actions
            .contains(&VolumeAction::RecordVolume { volume: found })
    );
}

#[test]
fn never_means_never() {
    let never = VolumeIntent {
        initialize: false,
        ..intent()
    };
    let mut observed = on(vec![fresh("a", 0)]);
    observed.nodes[0].reason = Some("no superblock".to_owned());
    let plan = plan_volume(&never, &observed);
    assert_eq!(
        plan.actions,
        [VolumeAction::Attach {
            node: "a".to_owned()
        }]
    );
    assert_eq!(plan.report.ready.reason, reason::NOT_FORMATTED);
    assert!(plan.report.ready.message.contains("a: no superblock"));
}

#[test]
fn a_known_volume_is_attached_on_every_node_that_answers() {
    let known = VolumeIntent {
        volume: Some(VolumeId::from_bytes([3; 16])),
        ..intent()
    };
    let mut observed = on(vec![node("a", 0), fresh("b", 1), fresh("c", 2)]);
    observed.nodes[2].stream = Stream::Unknown;
    let plan = plan_volume(&known, &observed);
    assert_eq!(
        plan.actions,
        [VolumeAction::Attach {
            node: "b".to_owned()
        }]
    );
    assert_eq!(plan.report.ready.reason, reason::ATTACHED);
}

#[test]
fn an_attached_node_without_a_slot_is_registered_through_the_coordinator() {
    let known = VolumeIntent {
        volume: Some(VolumeId::from_bytes([3; 16])),
        ..intent()
    };
    let joining = NodeOnVolume {
        owner: None,
        path: Some(PathState::Paused),
        ..node("b", 1)
    };
    let plan = plan_volume(&known, &on(vec![node("a", 0), joining]));
    let uid = NodeUid::from_bytes([2; 16]);
    let change = Change::RegisterNode { node: uid };
    assert_eq!(
        plan.actions,
        [VolumeAction::Change {
            via: "a".to_owned(),
            change
        }]
    );
}

#[test]
fn fencing_that_does_not_exist_is_refused_by_a_condition() {
    let refused = VolumeIntent {
        fencing: None,
        ..intent()
    };
    let plan = plan_volume(&refused, &on(vec![fresh("a", 0)]));
    assert_eq!(plan.actions, []);
    assert_eq!(plan.report.fencing.status, Some(false));
    assert_eq!(plan.report.ready.reason, reason::FENCING_NOT_IMPLEMENTED);
}

#[test]
fn an_administrators_word_reaches_the_coordinator_once() {
    let victim = Owner {
        slot: SlotId(1),
        generation: Generation(1),
    };
    let said = VolumeIntent {
        volume: Some(VolumeId::from_bytes([3; 16])),
        confirmed: vec![victim],
        ..intent()
    };
    let mut observed = on(vec![node("a", 0)]);
    let plan = plan_volume(&said, &observed);
    let change = Change::ConfirmFenced {
        victim,
        confirmation: AdminConfirmation::Confirmed,
    };
    assert_eq!(
        plan.actions,
        [VolumeAction::Change {
            via: "a".to_owned(),
            change
        }]
    );
    observed.fenced = vec![victim];
    assert_eq!(plan_volume(&said, &observed).actions, []);
}

#[test]
fn the_taint_counts_only_where_the_volume_trusts_it_and_the_node_does_not_respond() {
    let known = VolumeIntent {
        volume: Some(VolumeId::from_bytes([3; 16])),
        ..intent()
    };
    let mut observed = on(vec![node("a", 0), node("b", 1)]);
    observed.nodes[1].out_of_service = true;
    observed.nodes[1].stream = Stream::Down { since: Moment(0) };
    assert_eq!(plan_volume(&known, &observed).actions, []);
    let trusting = VolumeIntent {
        trust_taint: true,
        ..known
    };
    assert_eq!(plan_volume(&trusting, &observed).actions.len(), 1);
    observed.nodes[1].stream = Stream::Up;
    assert_eq!(plan_volume(&trusting, &observed).actions, []);
}

#[test]
fn a_volume_in_use_is_not_let_go() {
    let deleting = VolumeIntent {
        deleting: true,
        ..intent()
    };
    let mut observed = on(vec![node("a", 0)]);
    observed.in_use = true;
    let plan = plan_volume(&deleting, &observed);
    assert_eq!(
        (plan.actions, plan.report.ready.reason),
        (vec![], reason::IN_USE)
    );
    observed.in_use = false;
    let plan = plan_volume(&deleting, &observed);
    assert_eq!(
        plan.actions,
        [VolumeAction::Detach {
            node: "a".to_owned()
        }]
    );
    let plan = plan_volume(&deleting, &on(vec![fresh("a", 0)]));
    assert_eq!(plan.actions, [VolumeAction::RemoveFinalizer]);
}

#[test]
fn a_node_that_could_not_format_is_not_chosen_again_while_another_can() {
    let mut observed = on(vec![fresh("a", 0), fresh("b", 1)]);
    observed.nodes[0].reason = Some("no such device".to_owned());
    observed.format = FormatState::Failed {
        message: "a: no such device".to_owned(),
    };
    let plan = plan_volume(&intent(), &observed);
    assert_eq!(
        plan.actions,
        [VolumeAction::ChooseFormatter {
            node: "b".to_owned()
        }]
    );
    assert_eq!(plan.report.ready.reason, reason::NOT_FORMATTED);
}

fn known() -> VolumeIntent {
    VolumeIntent {
        volume: Some(VolumeId::from_bytes([3; 16])),
        ..intent()
    }
}

/// With an empty list of nodes every slot and generation vanished from the status, which are what an
/// administrator has to name when a node is dead.
#[test]
fn a_new_leader_leaves_the_status_alone_until_a_node_has_reported() {
    let mut observed = on(vec![]);
    observed.no_report_for = Some(Duration::from_secs(2));
    assert!(plan_volume(&known(), &observed).report.keep);
    observed.no_report_for = Some(Duration::from_secs(30));
    let report = plan_volume(&known(), &observed).report;
    assert!(!report.keep);
    assert_eq!(
        (report.ready.status, report.ready.reason),
        (None, reason::UNKNOWN)
    );
    let report = plan_volume(&known(), &on(vec![node("a", 0)])).report;
    assert!(!report.keep);
    assert_eq!(report.ready.status, Some(true));
}

#[test]
fn a_volume_that_was_never_found_has_nothing_to_keep() {
    let mut observed = on(vec![]);
    observed.no_report_for = Some(Duration::ZERO);
    let report = plan_volume(&intent(), &observed).report;
    assert!(!report.keep);
    assert_eq!(report.ready.reason, reason::FORMATTING);
}

#[test]
fn whatever_is_wrong_with_a_device_is_in_the_condition_with_its_node() {
    for why in [
        "/dev/disk/by-id/lun: No such file or directory",
        "the device holds no Bascule volume (magic missing in both superblocks)",
        "/dev/disk/by-id/lun: volume 7 is bound to cluster a, not b",
        "the volume's format is newer than this release knows",
    ] {
        let mut broken = fresh("a", 0);
        broken.reason = Some(why.to_owned());
        let mut observed = on(vec![broken]);
        observed.format = FormatState::NotBlank;
        let never_seen = plan_volume(&intent(), &observed).report.ready;
        assert_eq!(never_seen.reason, reason::NOT_BLANK);
        let seen_before = plan_volume(&known(), &observed).report.ready;
        assert_eq!(seen_before.reason, reason::NOT_ATTACHED);
        for ready in [never_seen, seen_before] {
            assert_eq!(ready.status, Some(false));
            assert!(
                ready.message.contains(&format!("a: {why}")),
                "{}",
                ready.message
            );
        }
    }
}

#[test]
fn a_device_that_is_too_small_is_named() {
    let mut observed = on(vec![fresh("a", 0)]);
    observed.format = FormatState::Failed {
        message: "a cannot format it: /dev/disk/by-id/lun is too small".to_owned(),
    };
    let ready = plan_volume(&intent(), &observed).report.ready;
    assert_eq!(ready.reason, reason::NOT_FORMATTED);
    assert!(ready.message.contains("is too small"), "{}", ready.message);
}

/// A process that could not open its volume received a request for a slot every two seconds.
#[test]
fn a_node_that_has_not_found_the_volume_is_given_no_slot() {
    let broken = NodeOnVolume {
        attached: true,
        reason: Some("no such device".to_owned()),
        ..fresh("a", 0)
    };
    assert_eq!(plan_volume(&known(), &on(vec![broken])).actions, []);
}
