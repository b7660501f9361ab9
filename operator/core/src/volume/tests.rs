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
fn one_node_is_written_down_before_it_formats() {
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
fn nobody_formats_in_place_of_a_chosen_node_that_is_away() {
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
        word: AdministratorsWord::Confirmed,
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
fn the_taint_counts_only_where_the_volume_trusts_it_and_the_node_is_silent() {
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
