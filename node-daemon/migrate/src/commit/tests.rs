//! Single steps of the source's commit. The whole is explored in `model`.

use bascule_types::{Generation, SlotId};
use proptest::prelude::*;

use super::*;

const SOURCE: Owner = owner(1, 5);
const DESTINATION: Owner = owner(2, 9);
const ATTEMPT: AttemptId = AttemptId::from_bytes([1; 16]);
const RETRACTION: AttemptId = AttemptId::from_bytes([2; 16]);

const fn owner(slot: u16, generation: u64) -> Owner {
    Owner {
        slot: SlotId(slot),
        generation: Generation(generation),
    }
}

const fn terms() -> Terms {
    Terms {
        source: SOURCE,
        epoch: Epoch(4),
        destination: DESTINATION,
        attempt: ATTEMPT,
    }
}

const fn row(owner: Owner, epoch: u64, attempt: Option<AttemptId>) -> OwnershipRecord {
    OwnershipRecord {
        owner: Some(owner),
        epoch: Epoch(epoch),
        attempt,
    }
}

fn begun() -> Commit {
    Commit::begin(terms(), RETRACTION)
}

#[test]
fn an_unanswered_request_is_repeated_with_the_same_attempt() {
    let request = begun().request();
    let mut commit = begun();
    for _ in 0..1000 {
        commit = commit.next(Reply::NoAnswer);
        assert_eq!(commit.request(), request);
    }
}

#[test]
fn a_record_that_shows_the_transfer_commits_after_any_reply() {
    let transferred = row(DESTINATION, 5, Some(ATTEMPT));
    for reply in [Reply::Granted(transferred), Reply::Refused(transferred)] {
        assert_eq!(begun().next(reply), Commit::Committed { epoch: Epoch(5) });
    }
}

#[test]
fn after_a_refusal_the_source_retracts_in_a_new_epoch() {
    let commit = begun().next(Reply::Refused(row(SOURCE, 4, None)));
    let Some(TransferRequest::Retract(retraction)) = commit.request() else {
        panic!("{commit:?}");
    };
    assert_eq!((retraction.from, retraction.to), (SOURCE, SOURCE));
    assert_eq!(retraction.attempt, RETRACTION);
    let commit = commit.next(Reply::Granted(row(SOURCE, 5, Some(RETRACTION))));
    assert_eq!(
        commit,
        Commit::Resumed {
            owner: SOURCE,
            epoch: Epoch(5)
        }
    );
}

#[test]
fn a_retraction_that_comes_too_late_is_a_commit() {
    let commit = begun()
        .next(Reply::Refused(row(SOURCE, 4, None)))
        .next(Reply::Refused(row(DESTINATION, 5, Some(ATTEMPT))));
    assert_eq!(commit, Commit::Committed { epoch: Epoch(5) });
}

#[test]
fn a_source_that_rejoined_requests_under_its_new_generation() {
    let commit = begun().next(Reply::Refused(row(owner(1, 6), 4, None)));
    let Some(TransferRequest::Retract(retraction)) = commit.request() else {
        panic!("{commit:?}");
    };
    assert_eq!(retraction.from, owner(1, 6));
    assert_eq!(retraction.to, owner(1, 6));
}

#[test]
fn another_owner_or_none_terminates_the_source() {
    let no_owner = OwnershipRecord {
        owner: None,
        epoch: Epoch(4),
        attempt: None,
    };
    for reply in [
        Reply::Refused(row(owner(3, 1), 5, None)),
        Reply::Refused(row(SOURCE, 5, None)),
        Reply::Refused(row(DESTINATION, 6, Some(ATTEMPT))),
        Reply::Refused(row(owner(1, 4), 4, None)),
        Reply::Refused(no_owner),
        Reply::NoSuchVm,
    ] {
        assert_eq!(begun().next(reply), Commit::Lost, "{reply:?}");
    }
}

#[test]
fn giving_up_begins_with_the_retraction() {
    let commit = Commit::give_up(terms(), RETRACTION);
    assert!(matches!(
        commit.request(),
        Some(TransferRequest::Retract(_))
    ));
    let resumed = commit.next(Reply::Granted(row(SOURCE, 5, Some(RETRACTION))));
    assert!(matches!(resumed, Commit::Resumed { .. }));
}

#[test]
#[should_panic(expected = "an attempt id of its own")]
fn a_retraction_under_the_attempts_own_id_is_a_broken_invariant() {
    let _commit = Commit::begin(terms(), ATTEMPT);
}

proptest! {
    /// With any records in any order, this side runs again only after a row that its
    /// own retraction made.
    #[test]
    fn only_the_retractions_own_row_resumes(
        replies in proptest::collection::vec(
            (0..3u8, 1..4u16, 4..7u64, 3..7u64, 0..4u8), 0..12)
    ) {
        let mut commit = begun();
        for (kind, slot, generation, epoch, attempt) in replies {
            let attempt = [None, Some(ATTEMPT), Some(RETRACTION), Some(AttemptId::from_bytes([9; 16]))]
                [usize::from(attempt)];
            let row = row(owner(slot, generation), epoch, attempt);
            let reply = match kind {
                0 => Reply::Granted(row),
                1 => Reply::Refused(row),
                _ => Reply::NoAnswer,
            };
            let before = commit;
            commit = commit.next(reply);
            if let Commit::Resumed { .. } = commit && before != commit {
                prop_assert_eq!(row.attempt, Some(RETRACTION));
                prop_assert_eq!(row.epoch, Epoch(5));
                prop_assert_eq!(slot, 1);
            }
            if before.request().is_none() {
                prop_assert_eq!(before, commit, "an outcome is final");
            }
        }
    }
}
