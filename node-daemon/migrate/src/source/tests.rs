//! The source's order of things, and what a failure does in each phase.

use bascule_types::{Generation, SlotId};

use super::*;
use crate::commit::OwnershipRecord;

const SOURCE: Owner = owner(1);
const DESTINATION: Owner = owner(2);

const fn owner(slot: u16) -> Owner {
    Owner {
        slot: SlotId(slot),
        generation: Generation(1),
    }
}

const ATTEMPT: Attempt = Attempt {
    vm: VmUid::from_bytes([1; 16]),
    attempt: AttemptId::from_bytes([2; 16]),
    retraction: AttemptId::from_bytes([3; 16]),
    source: SOURCE,
    epoch: Epoch(4),
    volume: VolumeId::from_bytes([5; 16]),
    destination: DESTINATION,
};

fn welcome() -> Welcome {
    Welcome {
        version: 1,
        streams: 1,
        features: Features(0),
        destination: DESTINATION,
        restore_estimate: Duration::ZERO,
    }
}

fn failure() -> Abort {
    Abort::new(AbortReason::Timeout, "no frame in time")
}

/// The events of a move without incident, up to the commit point.
fn good_events() -> Vec<Event> {
    vec![
        Event::Welcomed(welcome()),
        Event::RoundAcked(0),
        Event::RoundAcked(1),
        Event::NextRound,
        Event::RoundAcked(2),
        Event::Stop,
        Event::Stopped,
        Event::AllSent,
        Event::RoundAcked(3),
        Event::Ready,
    ]
}

fn after(events: impl IntoIterator<Item = Event>) -> (Source, Vec<Action>) {
    let (mut source, _) = Source::begin(ATTEMPT);
    let mut actions = Vec::new();
    for event in events {
        let (next, action) = source.next(event);
        source = next;
        actions.push(action);
    }
    (source, actions)
}

fn committed_row() -> OwnershipRecord {
    OwnershipRecord {
        owner: Some(DESTINATION),
        epoch: Epoch(5),
        attempt: Some(ATTEMPT.attempt),
    }
}

#[test]
fn a_successful_migration_takes_these_steps() {
    let (source, actions) = after(good_events());
    let committing = Commit::begin(
        Terms {
            source: SOURCE,
            epoch: Epoch(4),
            destination: DESTINATION,
            attempt: ATTEMPT.attempt,
        },
        ATTEMPT.retraction,
    );
    assert_eq!(
        actions,
        [
            Action::Describe(Features(0)),
            Action::CopyRound(1),
            Action::Decide(1),
            Action::CopyRound(2),
            Action::Decide(2),
            Action::StopGuest,
            Action::SendRemainder(3),
            Action::AwaitReady,
            Action::AwaitReady,
            Action::RequestTransfer(committing.request().unwrap()),
        ]
    );
    assert_eq!(source.side(), Side::Unknown);
    let (source, action) = source.next(Event::Replied(Reply::Granted(committed_row())));
    assert_eq!(source.phase(), Phase::Departed);
    assert_eq!(
        action,
        Action::Depart(Committed {
            epoch: Epoch(5),
            owner: DESTINATION
        })
    );
}

#[test]
fn i5_a_failure_before_the_commit_point_keeps_the_guest_here_in_every_phase() {
    let events = good_events();
    for done in 0..events.len() {
        let (source, _) = after(events[..done].iter().cloned());
        assert!(source.phase().cancellable(), "{:?}", source.phase());
        assert_eq!(source.side(), Side::Source);
        let (source, action) = source.next(Event::Failed(failure()));
        assert_eq!(action, Action::KeepRunning(failure()));
        assert_eq!(source.phase(), Phase::Returned);
        assert_eq!(source.side(), Side::Source);
    }
}

#[test]
fn i2_after_the_commit_point_failures_and_the_peer_have_no_effect() {
    let (committing, _) = after(good_events());
    assert!(!committing.phase().cancellable());
    for event in [
        Event::Failed(failure()),
        Event::Ready,
        Event::RoundAcked(3),
        Event::Welcomed(welcome()),
        Event::Stop,
    ] {
        let (source, action) = committing.clone().next(event);
        assert_eq!(source, committing);
        assert_eq!(action, Action::Nothing);
    }
    let (gone, _) = committing.next(Event::Replied(Reply::Granted(committed_row())));
    for event in good_events() {
        let (source, action) = gone.clone().next(event);
        assert_eq!(source, gone);
        assert_eq!(action, Action::Nothing);
    }
}

#[test]
fn an_event_out_of_order_keeps_the_guest_here() {
    for early in [
        Event::Ready,
        Event::RoundAcked(1),
        Event::Stopped,
        Event::AllSent,
        Event::Replied(Reply::NoAnswer),
    ] {
        let (source, actions) = after([Event::Welcomed(welcome()), early.clone()]);
        assert_eq!(source.phase(), Phase::Returned, "{early:?}");
        assert!(
            matches!(&actions[1], Action::KeepRunning(abort) if abort.reason == AbortReason::Protocol)
        );
    }
}

#[test]
fn a_choice_that_was_not_offered_is_refused() {
    let wrong = [
        Welcome {
            version: 2,
            ..welcome()
        },
        Welcome {
            features: Features(1 << 63),
            ..welcome()
        },
        Welcome {
            streams: 2,
            ..welcome()
        },
        Welcome {
            destination: SOURCE,
            ..welcome()
        },
        Welcome {
            destination: owner(3),
            ..welcome()
        },
    ];
    for welcome in wrong {
        let (source, _) = after([Event::Welcomed(welcome.clone())]);
        assert_eq!(source.phase(), Phase::Returned, "{welcome:?}");
    }
}

#[test]
fn a_retracted_attempt_resumes_under_the_owner_in_the_record() {
    let ours = |epoch, attempt| OwnershipRecord {
        owner: Some(SOURCE),
        epoch: Epoch(epoch),
        attempt,
    };
    let (source, _) = after(good_events());
    let (source, action) = source.next(Event::Replied(Reply::Refused(ours(4, None))));
    assert!(matches!(
        action,
        Action::RequestTransfer(TransferRequest::Retract(_))
    ));
    assert_eq!(source.side(), Side::Unknown);
    let retracted = ours(5, Some(ATTEMPT.retraction));
    let (source, action) = source.next(Event::Replied(Reply::Granted(retracted)));
    assert_eq!(source.phase(), Phase::Returned);
    let Action::Resume { owner, epoch, .. } = action else {
        panic!("{action:?}");
    };
    assert_eq!((owner, epoch), (SOURCE, Epoch(5)));
}

#[test]
fn only_frames_of_a_destination_become_events() {
    assert_eq!(
        event_of(&Frame::RoundAck { round: 3 }),
        Ok(Some(Event::RoundAcked(3)))
    );
    assert_eq!(event_of(&Frame::Pong { token: 1 }), Ok(None));
    assert_eq!(event_of(&Frame::Abort(failure())), Err(failure()));
    let error = event_of(&Frame::State(&[1])).unwrap_err();
    assert_eq!(error.reason, AbortReason::Protocol);
}

#[test]
fn the_pause_between_two_requests_is_bounded() {
    assert_eq!(retry_delay(0), Duration::from_millis(1));
    assert_eq!(retry_delay(u32::MAX), Duration::from_millis(512));
}

/// With a destination whose memory becomes resident meanwhile, the guest is stopped only once it is.
#[test]
fn a_source_waits_after_the_first_round_for_a_destination_that_announces_its_memory() {
    let announcing = Welcome {
        features: Features::RESIDENT,
        ..welcome()
    };
    let mut events = good_events();
    events[0] = Event::Welcomed(announcing);
    let (source, actions) = after(events[..3].to_vec());
    assert_eq!(source.phase(), Phase::AwaitingMemory);
    assert_eq!(source.side(), Side::Source);
    assert!(source.phase().cancellable());
    assert_eq!(actions.last(), Some(&Action::AwaitMemory));
    for early in [Event::Stop, Event::NextRound, Event::Ready] {
        let (next, action) = source.clone().next(early);
        assert_eq!(next.phase(), Phase::Returned);
        assert!(matches!(action, Action::KeepRunning(_)), "{action:?}");
    }
    events.insert(3, Event::Resident);
    let (source, actions) = after(events.clone());
    assert_eq!(source.phase(), Phase::Committing);
    assert_eq!(actions[3], Action::Decide(1), "{actions:?}");
    // Once is enough, and a destination that announced nothing has nothing to say.
    events.insert(6, Event::Resident);
    let mut unannounced = good_events();
    unannounced.insert(3, Event::Resident);
    for events in [events, unannounced] {
        let (source, _) = after(events);
        assert_eq!(source.phase(), Phase::Returned);
    }
}
