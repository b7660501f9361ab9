//! A guest used to be executed past a power-off that it requested in the last moments before a pause: it
//! then span at the destination of its migration, shown as running. Each way to end by itself, in each
//! phase in which it can be noticed; the resets are in `resets`.

use bascule_ipc::vm::{Request, Response, VmState};
use bascule_types::{Epoch, Generation, Owner, Ownership, SlotId};

use super::*;
use crate::GuestEnd;
use crate::process::actor::event::{Answer, HostShutdown};
use crate::process::actor::testing::Process;
use crate::testing::{COUNTER, POWER_OFF, TestVm, images, kvm_or_skip};

fn fault(what: &str) -> StopReason {
    StopReason::GuestFault { what: what.into() }
}

/// Every way to end that no thread of the machine has reported yet.
fn ends() -> Vec<StopReason> {
    let panicked = "blk0: device thread panicked".to_owned();
    vec![
        StopReason::GuestShutdown,
        fault("the guest reported a crash"),
        fault("net0: bad virtqueue 0"),
        StopReason::Failed { what: panicked },
    ]
}

#[test]
fn a_guest_that_ends_while_it_is_being_paused_ends_and_is_not_paused() {
    if !kvm_or_skip() {
        return;
    }
    for reason in ends() {
        let (mut process, _test) = Process::running(COUNTER);
        let done = process.pause();
        process.notice(reason.clone());
        process.park();
        assert_eq!(done.recv().unwrap(), Err(ended_text(&reason)), "{reason:?}");
        assert_eq!(process.ended(), reason);
    }
    // The control.
    let (mut process, _test) = Process::running(COUNTER);
    let done = process.pause();
    process.park();
    assert_eq!(done.recv().unwrap(), Ok(()));
    assert_eq!(process.actor.phase.state(), VmState::Paused);
}

#[test]
fn what_a_guest_did_before_the_pause_was_requested_is_not_lost_either() {
    if !kvm_or_skip() {
        return;
    }
    let (mut process, test) = Process::running(POWER_OFF);
    let off = StopReason::GuestShutdown;
    assert_eq!(test.await_end(), GuestEnd::Stopped(off.clone()));
    process.notice(off.clone());
    let done = process.pause();
    process.park();
    assert_eq!(done.recv().unwrap(), Err(ended_text(&off)));
    assert_eq!(process.ended(), off);
}

#[test]
fn a_running_or_paused_guest_that_ends_by_itself_is_ended() {
    if !kvm_or_skip() {
        return;
    }
    for reason in ends() {
        let (mut process, _test) = Process::running(COUNTER);
        process.notice(reason.clone());
        process.park();
        assert_eq!(process.ended(), reason);

        let mut process = Process::paused();
        process.notice(reason.clone());
        process.actor.process_notices();
        assert_eq!(process.ended(), reason);
    }
}

/// The commit request of a migration, live or quick: the destination would run past the end.
#[test]
fn i2_a_guest_that_has_ended_is_not_put_in_doubt_and_does_not_run_on() {
    if !kvm_or_skip() {
        return;
    }
    for reason in ends() {
        let mut process = Process::paused();
        process.notice(reason.clone());
        let refused = process.actor.mark_in_doubt().unwrap_err();
        assert_eq!(refused.to_string(), ended_text(&reason));
        assert_eq!(process.actor.phase.state(), VmState::Paused);
        let refused = process.actor.resume().unwrap_err();
        assert_eq!(refused.to_string(), ended_text(&reason));
        process.actor.process_notices();
        assert_eq!(process.ended(), reason);
    }
    // The control.
    let mut process = Process::paused();
    process.actor.mark_in_doubt().unwrap();
    process.actor.resume().unwrap();
    assert_eq!(process.actor.phase.state(), VmState::Running);
}

/// It used to run on, and its ownership in the new epoch was released by nobody.
#[test]
fn a_guest_that_ended_in_doubt_ends_in_the_ownership_that_the_attempt_has_begun() {
    if !kvm_or_skip() {
        return;
    }
    let owner = Owner {
        slot: SlotId(1),
        generation: Generation(1),
    };
    let mut process = Process::paused();
    process
        .actor
        .begin_ownership(Ownership::new(owner, Epoch(4)));
    process.actor.mark_in_doubt().unwrap();
    let reason = StopReason::Failed {
        what: "net0: the tap is gone".to_owned(),
    };
    process.notice(reason.clone());
    process.actor.process_notices();
    assert_eq!(process.actor.phase.state(), VmState::InDoubt);
    let retracted = Some(Ownership::new(owner, Epoch(5)));
    let refused = process.actor.resume_source(retracted).unwrap_err();
    assert_eq!(refused.to_string(), ended_text(&reason));
    assert_eq!(process.actor.ownership, retracted);
    process.actor.process_notices();
    assert_eq!(process.actor.status().epoch, Epoch(5));
    assert_eq!(process.ended(), reason);
}

#[test]
fn an_incoming_machine_that_fails_ends_before_it_could_arrive() {
    if !kvm_or_skip() {
        return;
    }
    let mut process = Process::new();
    let vm = TestVm::builder(1).0.incoming(images(COUNTER)).unwrap();
    process.actor.phase = Phase::Incoming(vm);
    let what = "net0: the tap is gone".to_owned();
    let reason = StopReason::Failed { what };
    process.notice(reason.clone());
    assert!(process.actor.resume().is_err());
    process.actor.process_notices();
    assert_eq!(process.ended(), reason);
}

#[test]
fn a_requested_stop_comes_before_what_the_guest_did_meanwhile() {
    if !kvm_or_skip() {
        return;
    }
    for reason in ends() {
        let (mut process, _test) = Process::running(COUNTER);
        let done = process.pause();
        drop(process.actor.stop(StopReason::Requested));
        process.notice(reason);
        process.park();
        let refused = Err(ended_text(&StopReason::Requested));
        assert_eq!(done.recv().unwrap(), refused);
        assert_eq!(process.ended(), StopReason::Requested);
    }
}

#[test]
fn a_guest_that_follows_the_hosts_shutdown_while_it_is_being_paused_has_stopped_on_request() {
    if !kvm_or_skip() {
        return;
    }
    for reason in ends() {
        let (mut process, _test) = Process::running(COUNTER);
        process.actor.host_shuts_down(HostShutdown::Requested);
        let done = process.pause();
        process.notice(reason.clone());
        process.park();
        assert!(done.recv().unwrap().is_err());
        let follows = reason == StopReason::GuestShutdown;
        let expected = if follows {
            StopReason::Requested
        } else {
            reason
        };
        assert_eq!(process.ended(), expected);
    }
}

#[test]
fn a_request_that_comes_after_the_end_is_refused_with_the_reason() {
    if !kvm_or_skip() {
        return;
    }
    let mut process = Process::paused();
    process.notice(StopReason::GuestShutdown);
    let Answer::Now(Response::Refused { reason }, _) =
        process.actor.control_request(&Request::Resume)
    else {
        panic!("the guest was executed past its end");
    };
    assert_eq!(reason, "the guest has shut itself down");
}
