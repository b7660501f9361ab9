//! What a machine hears of its guest's kernel when that panics.

use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use bascule_ipc::vm::{Panic, PanicStatus};

use super::*;
use crate::testing::{CRASH_KERNEL, PANIC};

/// A machine about to run `code`, and the panics that its device tells.
fn machine(code: &[u8]) -> (PausedVm, TestVm, Receiver<Panic>) {
    let (builder, test) = TestVm::builder(1);
    let (told_tx, told_rx) = channel();
    let builder = builder.with_panics(move |panic| told_tx.send(panic).unwrap());
    (builder.boot(images(code)).unwrap(), test, told_rx)
}

fn await_panic(told_rx: &Receiver<Panic>) -> Panic {
    told_rx.recv_timeout(Duration::from_secs(20)).unwrap()
}

fn panics(vm: &PausedVm) -> PanicStatus {
    vm.handle().pvpanic().status()
}

#[test]
fn a_guest_that_panics_is_heard_and_runs_on_and_its_panic_moves_with_it() {
    if !kvm_or_skip() {
        return;
    }
    let (vm, test, told_rx) = machine(PANIC);
    assert_eq!(panics(&vm), PanicStatus::default());
    let vm = vm.run().unwrap();
    assert_eq!(await_panic(&told_rx), Panic::Panicked);
    test.await_output(100);
    let old = vm.pause().unwrap();
    assert!(test.ended.try_recv().is_err(), "it has not ended");
    assert!(test.console.recent().starts_with(b"3ppp"));
    let panicked = PanicStatus {
        count: 1,
        present: Some(Panic::Panicked),
    };
    assert_eq!(panics(&old), panicked);

    let (mut new, _there) = moved(&old, 1);
    assert_eq!(panics(&new), panicked);
    new.reset().unwrap();
    let reset = PanicStatus {
        present: None,
        ..panicked
    };
    assert_eq!(panics(&new), reset);
}

/// Its last words are what a user looks for.
#[test]
fn the_output_of_a_guest_that_panicked_is_kept_over_the_reset() {
    if !kvm_or_skip() {
        return;
    }
    let (mut vm, test, told_rx) = machine(PANIC);
    let mut kept = Vec::new();
    for _ in 0..3 {
        let running = vm.run().unwrap();
        await_panic(&told_rx);
        vm = running.pause().unwrap();
        assert!(test.console.recent().starts_with(&kept));
        kept = test.console.recent();
        vm.reset().unwrap();
    }
    assert_eq!(panics(&vm).count, 3);
}

#[test]
fn a_crash_kernel_resets_the_machine_itself() {
    if !kvm_or_skip() {
        return;
    }
    let (vm, test, told_rx) = machine(CRASH_KERNEL);
    let vm = vm.run().unwrap();
    assert_eq!(await_panic(&told_rx), Panic::CrashLoaded);
    assert_eq!(test.await_end(), GuestEnd::Reset(ResetCause::Guest));
    let mut vm = vm.pause().unwrap();
    assert_eq!(panics(&vm).present, Some(Panic::CrashLoaded));
    assert_eq!(test.console.recent(), b"d");
    vm.reset().unwrap();
    assert_eq!(panics(&vm).present, None);
}
