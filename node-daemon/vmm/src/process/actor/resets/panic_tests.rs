//! A guest whose kernel panics, with both policies, whatever its process is doing.

use bascule_ipc::vm::{Panic, PanicStatus, Request, VmState};
use bascule_types::OnPanic;

use super::*;
use crate::process::actor::build::on_panicked;
use crate::process::actor::event::{Done, Event};
use crate::process::actor::reset_wait::FREE_RESETS;
use crate::process::actor::testing::Process;
use crate::process::actor::vm_actor::PauseFor;
use crate::testing::{CRASH_KERNEL, PANIC, TestVm, images, kvm_or_skip};

const PANICKED: PanicStatus = PanicStatus {
    count: 1,
    present: Some(Panic::Panicked),
};

impl Process {
    /// A guest that runs `code`, of a VM with this policy.
    fn with_policy(policy: OnPanic, code: &[u8]) -> (Self, TestVm) {
        let mut process = Self::new();
        let actor = &mut process.actor;
        let (builder, test) = TestVm::builder(1);
        let heard = on_panicked(actor.notices.clone(), policy, actor.handle());
        let vm = builder.with_panics(heard).boot(images(code)).unwrap();
        actor.pvpanic = Some(vm.handle().pvpanic());
        actor.phase = Phase::Running(vm.run().unwrap());
        (process, test)
    }

    fn await_panic(&self) {
        match self.inbox.recv().unwrap() {
            Event::Notices => {}
            other => panic!("{other:?}"),
        }
    }

    fn pause_for_migration(&mut self) -> Done {
        self.actor.pause(PauseFor::Migration).unwrap()
    }

    fn phase(&self) -> &'static str {
        self.actor.phase.name()
    }
}

#[test]
fn a_panicked_guest_is_reset_in_its_process_again_and_again() {
    if !kvm_or_skip() {
        return;
    }
    let (mut process, _test) = Process::with_policy(OnPanic::Restart, PANIC);
    for count in 1..=3 {
        process.await_panic();
        let panics = process.actor.status().panics;
        let present = Some(Panic::Panicked);
        assert_eq!(panics, PanicStatus { count, present });
        process.park();
        process.finish_reset();
        let resets = process.actor.status().resets;
        assert_eq!(
            (resets.count, resets.last),
            (count, Some(ResetCause::Panic))
        );
    }
}

#[test]
fn a_guest_that_panics_whenever_it_boots_waits() {
    if !kvm_or_skip() {
        return;
    }
    let (mut process, _test) = Process::with_policy(OnPanic::Restart, PANIC);
    for _ in 0..FREE_RESETS {
        process.await_panic();
        process.park();
        process.finish_reset();
    }
    process.await_panic();
    process.park();
    assert_eq!(process.phase(), "between two resets");
    let status = process.actor.status();
    let waits = "1 s before its next reset: the guest's kernel has panicked, 6 times in a row";
    assert!(status.resets.waits.unwrap().starts_with(waits));
    assert_eq!(status.panics.present, Some(Panic::Panicked));
}

#[test]
fn a_panicked_guest_that_is_to_be_left_runs_on_and_can_be_moved_and_reset_on_request() {
    if !kvm_or_skip() {
        return;
    }
    let (mut process, test) = Process::with_policy(OnPanic::Leave, PANIC);
    process.await_panic();
    process.actor.process_notices();
    assert_eq!(process.phase(), "running");
    test.await_output(test.written() + 100);
    assert_eq!(process.actor.status().panics, PANICKED);

    let done = process.pause_for_migration();
    process.park();
    assert_eq!(done.recv().unwrap(), Ok(()));
    process.actor.mark_in_doubt().unwrap();
    process.actor.resume_source(None).unwrap();
    assert_eq!(process.phase(), "running");

    process.actor.control_request(&Request::Reset);
    process.park();
    process.finish_reset();
    let status = process.actor.status();
    assert_eq!(status.resets.last, Some(ResetCause::Requested));
}

/// The source's own last word would otherwise be lost with it.
#[test]
fn i2_a_guest_that_panics_while_a_migration_pauses_it_stays_and_is_reset() {
    if !kvm_or_skip() {
        return;
    }
    let (mut process, test) = Process::with_policy(OnPanic::Restart, PANIC);
    // Its panic is told, and not yet taken.
    test.await_output(2);
    let done = process.pause_for_migration();
    process.await_panic();
    process.park();
    let refused = ResetCause::Panic.text().to_owned();
    assert_eq!(done.recv().unwrap(), Err(refused));
    process.actor.resume_source(None).unwrap();
    process.finish_reset();
    assert_eq!(process.actor.status().resets.count, 1);
}

#[test]
fn a_panic_before_a_pause_on_request_resets_the_guest_when_it_is_resumed() {
    if !kvm_or_skip() {
        return;
    }
    let (mut process, test) = Process::with_policy(OnPanic::Restart, PANIC);
    test.await_output(2);
    let done = process.pause();
    process.await_panic();
    process.park();
    assert_eq!(done.recv().unwrap(), Ok(()));
    let status = process.actor.status();
    assert_eq!((status.state, status.panics), (VmState::Paused, PANICKED));
    process.actor.resume().unwrap();
    process.finish_reset();
    assert_eq!(process.actor.status().resets.count, 1);
}

#[test]
fn a_guest_is_not_reset_while_its_crash_kernel_saves_the_memory() {
    if !kvm_or_skip() {
        return;
    }
    for policy in [OnPanic::Restart, OnPanic::Leave] {
        let (mut process, test) = Process::with_policy(policy, CRASH_KERNEL);
        process.await_panic();
        process.actor.process_notices();
        assert_eq!(process.phase(), "running");
        let present = Some(Panic::CrashLoaded);
        let status = process.actor.status();
        assert_eq!(status.panics, PanicStatus { count: 1, present });
        // It is done.
        test.await_end();
        assert_eq!(test.console.recent(), b"d");
        process.notice_reset(ResetCause::Guest);
        process.park();
        process.finish_reset();
        let status = process.actor.status();
        assert_eq!(status.resets.last, Some(ResetCause::Guest));
    }
}
