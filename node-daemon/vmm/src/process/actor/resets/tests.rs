use bascule_ipc::vm::{Request, Response, VmState};
use bascule_types::{Epoch, Generation, Owner, Ownership, SlotId};

use super::*;
use crate::process::actor::event::{Answer, HostShutdown, MigrationRequest};
use crate::process::actor::reset_wait::FREE_RESETS;
use crate::process::actor::testing::Process;
use crate::testing::{COUNTER, RESET, TRIPLE_FAULT, TestVm, kvm_or_skip};

const CAUSES: [ResetCause; 3] = [
    ResetCause::Guest,
    ResetCause::TripleFault,
    ResetCause::Panic,
];

fn accepted(answer: &Answer) -> bool {
    matches!(answer, Answer::Now(Response::Accepted, _))
}

impl Process {
    fn request_reset(&mut self) -> Answer {
        let answer = self.actor.control_request(&Request::Reset);
        self.actor.process_notices();
        answer
    }

    fn migration_pause(&mut self) -> super::super::event::Done {
        self.actor
            .pause(super::super::vm_actor::PauseFor::Migration)
            .unwrap()
    }
}

/// A guest that resets itself whenever it boots, until it waits.
fn looping() -> (Process, TestVm) {
    let (mut process, test) = Process::running(RESET);
    for _ in 0..FREE_RESETS {
        test.await_end();
        process.notice_reset(ResetCause::Guest);
        process.park();
        process.finish_reset();
    }
    test.await_end();
    process.notice_reset(ResetCause::Guest);
    process.park();
    (process, test)
}

#[test]
fn a_guest_that_resets_itself_runs_again_in_its_process_and_ownership() {
    if !kvm_or_skip() {
        return;
    }
    let owner = Owner {
        slot: SlotId(1),
        generation: Generation(1),
    };
    let ownership = Ownership::new(owner, Epoch(4));
    for (code, cause) in [(RESET, CAUSES[0]), (TRIPLE_FAULT, CAUSES[1])] {
        let (mut process, test) = Process::running(code);
        process.actor.begin_ownership(ownership);
        for count in 1..=3 {
            assert_eq!(test.await_end(), crate::GuestEnd::Reset(cause));
            process.notice_reset(cause);
            process.park();
            let status = process.actor.status();
            assert_eq!(status.state, VmState::Running);
            process.finish_reset();
            let status = process.actor.status();
            assert_eq!(status.state, VmState::Running);
            assert_eq!(
                (status.resets.count, status.resets.last),
                (count, Some(cause))
            );
            assert_eq!(process.actor.ownership, Some(ownership));
        }
    }
}

#[test]
fn a_guest_in_a_loop_waits_with_its_reason_in_the_status_and_can_be_reset_or_stopped() {
    if !kvm_or_skip() {
        return;
    }
    let (mut process, _test) = looping();
    assert_eq!(process.actor.phase.name(), "between two resets");
    let status = process.actor.status();
    assert_eq!(status.state, VmState::Running);
    let waits = status.resets.waits.unwrap();
    assert!(
        waits.starts_with("1 s before its next reset: the guest has reset itself"),
        "{waits}"
    );
    assert_eq!(process.actor.waits_for(), Some(waits));
    for request in [Request::Pause, Request::PowerButton, Request::Exit] {
        let answer = process.actor.control_request(&request);
        assert!(
            matches!(answer, Answer::Now(Response::Refused { .. }, _)),
            "{request:?}"
        );
    }
    // The wait of another reset changes nothing.
    process
        .actor
        .reset_due(process.actor.delayed.wrapping_sub(1));
    assert_eq!(process.actor.phase.name(), "between two resets");
    process.actor.reset_due(process.actor.delayed);
    assert_eq!(process.actor.status().resets.waits, None);
    loop {
        // The wait that was just taken for over reports itself, too.
        match process.next_task() {
            TaskOutcome::ResetDue(number) => process.actor.reset_due(number),
            TaskOutcome::Reset(reset) => break process.actor.reset_done(reset),
            _ => panic!("no reset"),
        }
    }
    assert_eq!(process.actor.phase.name(), "running");

    let (mut process, _test) = looping();
    assert!(accepted(&process.request_reset()));
    process.finish_reset();
    assert_eq!(process.actor.phase.name(), "running");

    let (mut process, _test) = looping();
    drop(process.actor.stop(StopReason::Requested));
    assert_eq!(process.ended(), StopReason::Requested);
}

#[test]
fn a_stop_that_is_requested_during_a_reset_comes_first() {
    if !kvm_or_skip() {
        return;
    }
    for cause in CAUSES {
        let (mut process, _test) = Process::running(COUNTER);
        process.notice_reset(cause);
        process.park();
        drop(process.actor.stop(StopReason::Requested));
        process.finish_reset();
        assert_eq!(process.ended(), StopReason::Requested);
        // And before the reset begins.
        let (mut process, _test) = Process::running(COUNTER);
        drop(process.actor.stop(StopReason::Requested));
        process.notice_reset(cause);
        process.park();
        assert_eq!(process.ended(), StopReason::Requested);
    }
}

#[test]
fn a_guest_that_cannot_go_on_is_not_reset() {
    if !kvm_or_skip() {
        return;
    }
    let what = "blk0: device thread panicked".to_owned();
    let failed = StopReason::Failed { what };
    for cause in CAUSES {
        for reason in [failed.clone(), StopReason::GuestShutdown] {
            let (mut process, _test) = Process::running(COUNTER);
            process.notice_reset(cause);
            process.notice(reason.clone());
            process.park();
            assert_eq!(process.ended(), reason);
            // Noticed while it was being reset.
            let (mut process, _test) = Process::running(COUNTER);
            process.notice_reset(cause);
            process.park();
            process.notice(reason.clone());
            process.finish_reset();
            assert_eq!(process.ended(), reason);
        }
    }
}

#[test]
fn a_guest_that_is_paused_on_request_is_reset_when_it_is_resumed() {
    if !kvm_or_skip() {
        return;
    }
    for cause in CAUSES {
        let (mut process, _test) = Process::running(COUNTER);
        let done = process.pause();
        process.notice_reset(cause);
        process.park();
        assert_eq!(done.recv().unwrap(), Ok(()));
        assert_eq!(process.actor.phase.state(), VmState::Paused);
        let refused = process.actor.mark_in_doubt().unwrap_err();
        assert_eq!(refused.to_string(), cause.text());
        assert!(accepted(&process.actor.control_request(&Request::Resume)));
        process.finish_reset();
        assert_eq!(process.actor.status().resets.count, 1);
        assert_eq!(process.actor.phase.state(), VmState::Running);
    }
}

/// Its migration fails: the guest is reset here and goes on.
#[test]
fn i2_a_guest_that_resets_itself_while_a_migration_pauses_it_stays_and_is_reset() {
    if !kvm_or_skip() {
        return;
    }
    for cause in CAUSES {
        let (mut process, _test) = Process::running(COUNTER);
        let done = process.migration_pause();
        process.notice_reset(cause);
        process.park();
        assert_eq!(done.recv().unwrap(), Err(cause.text().to_owned()));
        process.actor.resume_source(None).unwrap();
        process.finish_reset();
        process.actor.resume_source(None).unwrap();
        assert_eq!(process.actor.phase.state(), VmState::Running);
        assert_eq!(process.actor.status().resets.count, 1);
    }
}

#[test]
fn a_reset_that_is_requested_resets_a_running_guest_and_one_that_is_paused_when_it_is_resumed() {
    if !kvm_or_skip() {
        return;
    }
    let (mut process, _test) = Process::running(COUNTER);
    assert!(accepted(&process.request_reset()));
    process.park();
    assert!(!accepted(&process.request_reset()), "one is under way");
    process.finish_reset();
    let resets = process.actor.status().resets;
    assert_eq!(
        (resets.count, resets.last),
        (1, Some(ResetCause::Requested))
    );

    let mut process = Process::paused();
    assert!(accepted(&process.request_reset()));
    assert_eq!(process.actor.phase.state(), VmState::Paused);
    process.actor.resume().unwrap();
    process.finish_reset();
    assert_eq!(process.actor.status().resets.count, 1);
}

#[test]
fn a_guest_that_resets_itself_while_the_host_shuts_down_stops() {
    if !kvm_or_skip() {
        return;
    }
    let fault = |cause: ResetCause| StopReason::GuestFault {
        what: cause.text().to_owned(),
    };
    let [_, triple_fault, panic] = CAUSES.map(fault);
    let reasons = [StopReason::Requested, triple_fault, panic];
    for (cause, reason) in CAUSES.into_iter().zip(reasons) {
        let (mut process, _test) = Process::running(COUNTER);
        process.actor.host_shuts_down(HostShutdown::Requested);
        process.notice_reset(cause);
        process.park();
        assert_eq!(process.ended(), reason);
        // The host begins to shut down during the reset.
        let (mut process, _test) = Process::running(COUNTER);
        process.notice_reset(cause);
        process.park();
        process.actor.host_shuts_down(HostShutdown::Requested);
        process.finish_reset();
        assert_eq!(process.ended(), StopReason::Requested);
    }
    let (mut process, _test) = looping();
    process.actor.host_shuts_down(HostShutdown::Requested);
    process.actor.continue_host_shutdown();
    assert_eq!(process.ended(), StopReason::Requested);
}

#[test]
fn a_machine_whose_images_cannot_be_read_again_ends_with_the_reason() {
    if !kvm_or_skip() {
        return;
    }
    let (builder, _test) = TestVm::builder(1);
    let first = std::sync::atomic::AtomicBool::new(true);
    let kernel = crate::testing::images(COUNTER);
    let images = move || match first.swap(false, std::sync::atomic::Ordering::SeqCst) {
        true => kernel(),
        false => Err("boot.kernel: cannot be read".into()),
    };
    let mut process = Process::paused();
    process.actor.phase = Phase::Running(builder.boot(Box::new(images)).unwrap().run().unwrap());
    process.notice_reset(ResetCause::Guest);
    process.park();
    process.finish_reset();
    let StopReason::Failed { what } = process.ended() else {
        panic!("it is not ended");
    };
    assert_eq!(what, "reset: boot.kernel: cannot be read");
}

#[test]
fn a_migration_thread_is_told_of_no_machine_that_it_could_save_during_a_reset() {
    if !kvm_or_skip() {
        return;
    }
    let (mut process, _test) = Process::running(COUNTER);
    process.notice_reset(ResetCause::Guest);
    process.park();
    let actor = process.actor.handle();
    let thread = std::thread::Builder::new()
        .spawn(move || actor.migration(MigrationRequest::Save))
        .unwrap();
    loop {
        match process.inbox.recv().unwrap() {
            super::super::event::Event::Migration(request) => {
                process.actor.migration_request(request);
                break;
            }
            super::super::event::Event::Task(TaskOutcome::Reset(reset)) => {
                // The save comes while the guest runs again.
                process.actor.reset_done(reset);
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(thread.join().unwrap().unwrap().is_err());
}
