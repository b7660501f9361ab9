use bascule_types::{Generation, SlotId};
use bascule_volume_format::change::RowName;

use super::*;

const ATTEMPT: AttemptId = AttemptId::from_bytes([1; 16]);
const RECLAIM: AttemptId = AttemptId::from_bytes([2; 16]);

fn owner(slot: u16, generation: u64) -> Owner {
    Owner {
        slot: SlotId(slot),
        generation: Generation(generation),
    }
}

fn paused() -> HandOver {
    HandOver::new(HandOverRequest {
        vm: VmUid::from_bytes([7; 16]),
        from: owner(0, 1),
        epoch: Epoch(5),
        to: owner(1, 1),
        attempt: ATTEMPT,
        reclaim: RECLAIM,
        rules: Rules::ENFORCED,
    })
}

fn row(owner: Owner, attempt: AttemptId) -> VmRow {
    VmRow {
        vm: VmUid::from_bytes([7; 16]),
        name: RowName::new("default/web").unwrap(),
        owner: Some(owner),
        epoch: Epoch(6),
        attempt: Some(attempt),
        spec_digest: [0; 32],
    }
}

fn after(events: Vec<HandOverEvent>) -> (HandOver, Option<HandOverCommand>) {
    let mut last = (paused(), None);
    for event in events {
        last = last.0.next(event);
    }
    last
}

/// The attempt and the asker of the last request.
fn requested(command: Option<HandOverCommand>) -> Option<(AttemptId, Owner)> {
    command.map(|HandOverCommand::Request(change)| match change {
        Change::Transfer { attempt, from, .. } => (attempt, from),
        other => panic!("not a transfer: {other:?}"),
    })
}

use HandOverEvent::{Ask, Cancel, Granted, NoAnswer, Refused};

#[test]
fn i5_before_the_request_a_cancelled_migration_resumes_the_source_at_once() {
    let (cancelled, command) = after(vec![Cancel]);
    assert_eq!(cancelled.phase(), HandOverPhase::MayResume(Epoch(5)));
    assert_eq!(command, None);
}

#[test]
fn i2_after_a_granted_transfer_the_source_never_runs_again() {
    let granted = Granted(ATTEMPT, row(owner(1, 1), ATTEMPT));
    let (gone, _) = after(vec![Ask, granted, Cancel, NoAnswer]);
    assert_eq!(gone.phase(), HandOverPhase::Gone);
}

#[test]
fn i2_an_unknown_outcome_is_asked_again_under_the_same_attempt() {
    let (asked, command) = after(vec![Ask, NoAnswer, NoAnswer]);
    assert_eq!(asked.phase(), HandOverPhase::Asked);
    assert_eq!(requested(command), Some((ATTEMPT, owner(0, 1))));
}

#[test]
fn i5_a_refused_transfer_is_taken_back_before_the_source_resumes() {
    let lapsed = Refusal::LeaseInvalid { owner: owner(1, 1) };
    let (reclaiming, command) = after(vec![Ask, Refused(ATTEMPT, lapsed)]);
    assert_eq!(reclaiming.phase(), HandOverPhase::Reclaiming);
    assert_eq!(requested(command), Some((RECLAIM, owner(0, 1))));
    let (resumed, _) = reclaiming.next(Granted(RECLAIM, row(owner(0, 1), RECLAIM)));
    assert_eq!(resumed.phase(), HandOverPhase::MayResume(Epoch(6)));
}

#[test]
fn i2_a_late_answer_to_the_transfer_does_not_end_the_taking_back_by_mistake() {
    let lapsed = Refusal::LeaseInvalid { owner: owner(1, 1) };
    let (still, command) = after(vec![Ask, Cancel, Refused(ATTEMPT, lapsed)]);
    assert_eq!(still.phase(), HandOverPhase::Reclaiming);
    assert_eq!(command, None);
    let (gone, _) = still.next(Granted(ATTEMPT, row(owner(1, 1), ATTEMPT)));
    assert_eq!(gone.phase(), HandOverPhase::Gone);
}

#[test]
fn i2_a_row_that_is_somebody_elses_is_gone() {
    for refusal in [
        Refusal::OwnedBy {
            owner: owner(1, 1),
            epoch: Epoch(6),
        },
        Refusal::EpochIs { epoch: Epoch(6) },
        Refusal::Fenced { owner: owner(0, 1) },
        Refusal::NoSuchVm,
    ] {
        let (gone, _) = after(vec![Ask, Refused(ATTEMPT, refusal)]);
        assert_eq!(gone.phase(), HandOverPhase::Gone, "{refusal}");
    }
}

#[test]
fn i5_a_source_that_went_on_in_a_new_generation_takes_its_row_back_under_that() {
    let kept = Refusal::OwnedBy {
        owner: owner(0, 2),
        epoch: Epoch(5),
    };
    let (reclaiming, command) = after(vec![Ask, Refused(ATTEMPT, kept)]);
    assert_eq!(reclaiming.phase(), HandOverPhase::Reclaiming);
    assert_eq!(requested(command), Some((RECLAIM, owner(0, 2))));
}
