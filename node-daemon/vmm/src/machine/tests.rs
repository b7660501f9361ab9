mod panics;
mod reset;
mod timers;

use std::sync::Arc;

use bascule_ipc::vm::{ResetCause, StopReason};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::testing::{
    AWAIT_BUTTON, COUNTER, ECHO, JUMP_TO_BIOS, POWER_OFF, RESET, TRIPLE_FAULT, TestVm, images,
    kvm_or_skip,
};
use crate::{DirtyTracker, GuestEnd, GuestMemory, MachineState, PausedVm};

/// Where [`COUNTER`] counts.
const COUNT_AT: GuestAddress = GuestAddress(0x20_0000);

fn copy_ram(from: &GuestMemory, to: &GuestMemory) {
    for region in from.iter() {
        let mut bytes = vec![0; usize::try_from(region.len()).unwrap()];
        from.read_slice(&mut bytes, region.start_addr()).unwrap();
        to.write_slice(&bytes, region.start_addr()).unwrap();
    }
}

/// A second machine with the RAM and state of `old`.
fn moved(old: &PausedVm, cpus: u32) -> (PausedVm, TestVm) {
    let saved = old.save().unwrap().encode().unwrap();
    let (builder, test) = TestVm::builder(cpus);
    let mut new = builder.incoming(images(COUNTER)).unwrap();
    copy_ram(old.handle().memory(), new.handle().memory());
    new.restore(MachineState::decode(&saved).unwrap()).unwrap();
    (new, test)
}

fn is_alphabet(output: &[u8]) -> bool {
    output.windows(2).all(|pair| match pair {
        [b'p', next] => *next == b'a',
        [this, next] => *next == this + 1,
        _ => false,
    })
}

#[test]
fn a_guest_prints_on_its_serial_port_and_executes_nothing_while_paused() {
    if !kvm_or_skip() {
        return;
    }
    let (vm, test) = TestVm::with(COUNTER);
    let vm = vm.run().unwrap();
    test.await_output(100);
    let vm = vm.pause().unwrap();
    let output = test.console.recent();
    assert!(is_alphabet(&output), "{}", String::from_utf8_lossy(&output));
    let counted: u32 = vm.handle().memory().read_obj(COUNT_AT).unwrap();
    let vm = vm.run().unwrap();
    test.await_output(test.written() + 100);
    let vm = vm.pause().unwrap();
    let output = test.console.recent();
    assert!(
        is_alphabet(&output),
        "an access was lost or doubled by the pause"
    );
    assert!(vm.handle().memory().read_obj::<u32>(COUNT_AT).unwrap() >= counted + 100);
}

#[test]
fn a_restored_guest_continues_where_the_saved_one_stopped() {
    if !kvm_or_skip() {
        return;
    }
    let (vm, first) = TestVm::with(COUNTER);
    let vm = vm.run().unwrap();
    first.await_output(100);
    let old = vm.pause().unwrap();
    let (new, second) = moved(&old, 1);
    old.end();
    let before = first.console.recent();
    assert_eq!(second.console.recent(), before, "the past has moved, too");
    let new = new.run().unwrap();
    second.await_output(first.written() + 100);
    new.pause().unwrap().end();
    let output = second.console.recent();
    assert!(is_alphabet(&output), "{}", String::from_utf8_lossy(&output));
    assert!(output.starts_with(&before));
}

#[test]
fn a_machine_moves_back_and_forth_many_times() {
    if !kvm_or_skip() {
        return;
    }
    let (mut vm, mut test) = TestVm::with(COUNTER);
    for _ in 0..10 {
        let before = test.written();
        let running = vm.run().unwrap();
        test.await_output(before + 20);
        let old = running.pause().unwrap();
        (vm, test) = moved(&old, 1);
    }
    let output = test.console.recent();
    assert!(is_alphabet(&output), "{}", String::from_utf8_lossy(&output));
    assert!(output.len() >= 200);
}

#[test]
fn a_save_changes_nothing() {
    if !kvm_or_skip() {
        return;
    }
    let (vm, test) = TestVm::with(COUNTER);
    let running = vm.run().unwrap();
    test.await_output(10);
    let vm = running.pause().unwrap();
    let (first, second) = (vm.save().unwrap(), vm.save().unwrap());
    assert_eq!(first.vcpus[0].regs, second.vcpus[0].regs);
    assert_eq!(first.vcpus[0].lapic, second.vcpus[0].lapic);
    assert_eq!(first.irqchips, second.irqchips);
    let running = vm.run().unwrap();
    test.await_output(200);
    drop(running.pause().unwrap());
    assert!(is_alphabet(&test.console.recent()));
}

#[test]
fn a_state_of_another_shape_or_release_is_refused() {
    if !kvm_or_skip() {
        return;
    }
    let (vm, _test) = TestVm::with(COUNTER);
    let state = vm.save().unwrap();
    let (builder, _other) = TestVm::builder(2);
    let error = builder
        .incoming(images(COUNTER))
        .unwrap()
        .restore(state.clone())
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the saved machine has 1 vCPUs, this one 2"
    );
    let newer = MachineState {
        version: 2,
        ..state
    };
    let error = MachineState::decode(&newer.encode().unwrap()).unwrap_err();
    assert!(
        error.to_string().contains("version 2 is not known"),
        "{error}"
    );
    assert!(MachineState::decode(b"{}").is_err());
}

#[test]
fn the_dirty_log_sees_what_the_guest_writes_and_nothing_else() {
    if !kvm_or_skip() {
        return;
    }
    let (vm, test) = TestVm::with(COUNTER);
    let dirty = Arc::clone(vm.handle().dirty());
    dirty.start().unwrap();
    let all = dirty.fetch().unwrap();
    assert_eq!(all.count(), 16 * 256);
    dirty.clear(0, 0, all.words(0)).unwrap();
    let vm = vm.run().unwrap();
    test.await_output(10);
    let vm = vm.pause().unwrap();
    let written = dirty.fetch().unwrap();
    assert_eq!(written.count(), 1);
    assert_eq!(written.words(0)[0x200 / 64], 1);
    dirty.clear(0, 0, written.words(0)).unwrap();
    assert_eq!(dirty.fetch().unwrap().count(), 0);
    let vm = vm.run().unwrap();
    test.await_output(test.written() + 10);
    let vm = vm.pause().unwrap();
    assert_eq!(
        dirty.fetch().unwrap().count(),
        1,
        "a cleared page is watched again"
    );
    dirty.stop().unwrap();
    drop(vm);
}

#[test]
fn every_way_to_end_is_reported_with_its_reason() {
    if !kvm_or_skip() {
        return;
    }
    let cases = [
        (POWER_OFF, GuestEnd::Stopped(StopReason::GuestShutdown)),
        (RESET, GuestEnd::Reset(ResetCause::Guest)),
        (JUMP_TO_BIOS, GuestEnd::Reset(ResetCause::Guest)),
        (TRIPLE_FAULT, GuestEnd::Reset(ResetCause::TripleFault)),
    ];
    for (code, expected) in cases {
        let (vm, test) = TestVm::with(code);
        let vm = vm.run().unwrap();
        assert_eq!(test.await_end(), expected);
        vm.pause().unwrap().end();
    }
}

#[test]
fn a_triple_fault_ends_that_guest_alone() {
    if !kvm_or_skip() {
        return;
    }
    let (neighbour, neighbour_test) = TestVm::with(COUNTER);
    let neighbour = neighbour.run().unwrap();
    let (faulty, faulty_test) = TestVm::with(TRIPLE_FAULT);
    let faulty = faulty.run().unwrap();
    faulty_test.await_end();
    drop(faulty);
    let seen = neighbour_test.written();
    neighbour_test.await_output(seen + 100);
    assert!(neighbour_test.ended.try_recv().is_err());
    drop(neighbour);
}

#[test]
fn the_power_button_reaches_the_guest() {
    if !kvm_or_skip() {
        return;
    }
    let (vm, test) = TestVm::with(AWAIT_BUTTON);
    let vm = vm.run().unwrap();
    vm.handle().press_power_button().unwrap();
    let off = GuestEnd::Stopped(StopReason::GuestShutdown);
    assert_eq!(test.await_end(), off);
}

#[test]
fn serial_input_reaches_the_guest_in_order() {
    if !kvm_or_skip() {
        return;
    }
    let (vm, test) = TestVm::with(ECHO);
    let vm = vm.run().unwrap();
    let typed: Vec<u8> = (0..200).collect();
    vm.handle().type_in(&typed);
    test.await_output(200);
    assert_eq!(test.console.recent(), typed);
}

#[test]
fn a_machine_of_several_vcpus_is_saved_and_restored() {
    if !kvm_or_skip() {
        return;
    }
    let (builder, first) = TestVm::builder(3);
    let vm = builder.boot(images(COUNTER)).unwrap().run().unwrap();
    first.await_output(50);
    let old = vm.pause().unwrap();
    let (new, second) = moved(&old, 3);
    drop(old);
    let new = new.run().unwrap();
    second.await_output(first.written() + 50);
    let new = new.pause().unwrap();
    assert!(is_alphabet(&second.console.recent()));
    assert_eq!(new.save().unwrap().cpus(), 3);
}

#[test]
fn impossible_vcpu_counts_are_refused_with_the_field_named() {
    if !kvm_or_skip() {
        return;
    }
    for cpus in [0, 255, u32::MAX] {
        let memory = bascule_types::Bytes::mib(16);
        let (kvm, console) = (crate::kvm::open().unwrap(), crate::Console::new());
        let error = crate::VmBuilder::new(kvm, cpus, memory, console, drop).unwrap_err();
        assert!(error.to_string().starts_with("cpus: "), "{error}");
    }
}
