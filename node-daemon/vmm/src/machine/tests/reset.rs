//! A machine after a reset is as after power-on, whatever its guest has done before.

use super::*;
use crate::testing::{MESS, SMP_RESET};
use crate::vcpu::state::VcpuState;

/// Registers that count time: IA32_TSC, and Hyper-V's run time and reference counter of a guest that has
/// these.
const CLOCKS: [u32; 3] = [0x10, 0x4000_0010, 0x4000_0020];

fn machine(cpus: u32, code: &[u8]) -> (PausedVm, TestVm) {
    let (builder, test) = TestVm::builder(cpus);
    (builder.boot(images(code)).unwrap(), test)
}

/// Lets the guest run until it resets itself.
fn run_to_reset(vm: PausedVm, test: &TestVm) -> PausedVm {
    let vm = vm.run().unwrap();
    assert_eq!(test.await_end(), GuestEnd::Reset(ResetCause::Guest));
    vm.pause().unwrap()
}

fn ram(vm: &PausedVm) -> Vec<u8> {
    let mut bytes = vec![0; 16 << 20];
    let memory = vm.handle().memory().clone();
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

/// Without what counts time by itself.
fn still(mut state: MachineState) -> MachineState {
    for vcpu in &mut state.vcpus {
        vcpu.msrs.retain(|(index, _)| !CLOCKS.contains(index));
    }
    if let Some(pit) = &mut state.pit {
        let mut bare = pit.get();
        for channel in &mut bare.channels {
            channel.count_load_time = 0;
        }
        *pit = crate::blob::Blob::of(&bare);
    }
    state.pm_timer_ns = None;
    state.clock = crate::blob::Blob::of(&kvm_bindings::kvm_clock_data::default());
    state.resets = 0;
    state.console = None;
    state
}

fn assert_same_vcpu(index: usize, after: &VcpuState, fresh: &VcpuState) {
    for (after, fresh) in after.msrs.iter().zip(&fresh.msrs) {
        assert_eq!(after, fresh, "vCPU {index}: MSR {:#x}", fresh.0);
    }
    assert_eq!(after.regs, fresh.regs, "vCPU {index}");
    assert_eq!(after.sregs, fresh.sregs, "vCPU {index}");
    assert_eq!(after.lapic, fresh.lapic, "vCPU {index}");
    assert_eq!(after.mp_state, fresh.mp_state, "vCPU {index}");
    assert_eq!(after.debugregs, fresh.debugregs, "vCPU {index}");
    assert_eq!(after.xsave, fresh.xsave, "vCPU {index}");
    assert_eq!(after, fresh, "vCPU {index}");
}

#[test]
fn the_state_after_a_reset_is_that_after_power_on() {
    if !kvm_or_skip() {
        return;
    }
    for (cpus, code) in [(1, MESS), (2, SMP_RESET), (4, SMP_RESET)] {
        let (vm, test) = machine(cpus, code);
        let (fresh, memory) = (still(vm.save().unwrap()), ram(&vm));
        let mut vm = run_to_reset(vm, &test);
        let messed = still(vm.save().unwrap());
        assert_ne!(
            messed.vcpus, fresh.vcpus,
            "the control: the guest changed something"
        );
        assert!(ram(&vm) != memory, "the control: and its memory");
        vm.reset().unwrap();
        let after = still(vm.save().unwrap());
        for (index, (after, fresh)) in after.vcpus.iter().zip(&fresh.vcpus).enumerate() {
            assert_same_vcpu(index, after, fresh);
        }
        assert_eq!(after, fresh);
        assert!(ram(&vm) == memory, "{cpus} vCPUs");
        assert_eq!(vm.resets(), 1);
    }
}

#[test]
fn a_guest_boots_again_after_each_of_many_resets() {
    if !kvm_or_skip() {
        return;
    }
    let (mut vm, test) = machine(1, MESS);
    for _ in 0..20 {
        vm = run_to_reset(vm, &test);
        vm.reset().unwrap();
    }
    assert_eq!(vm.resets(), 20);
    assert_eq!(test.console.recent(), [b'm'; 20]);
}

#[test]
fn the_other_processors_of_a_machine_wait_for_their_start_again() {
    if !kvm_or_skip() {
        return;
    }
    for cpus in [2, 4] {
        let (mut vm, test) = machine(cpus, SMP_RESET);
        for _ in 0..5 {
            vm = run_to_reset(vm, &test);
            vm.reset().unwrap();
        }
        assert_eq!(test.console.recent(), [b'a'; 5], "{cpus} vCPUs");
    }
}

#[test]
fn a_triple_fault_is_a_reset_and_harms_nothing() {
    if !kvm_or_skip() {
        return;
    }
    let (mut vm, test) = machine(1, TRIPLE_FAULT);
    let fresh = still(vm.save().unwrap());
    for _ in 0..3 {
        let running = vm.run().unwrap();
        assert_eq!(test.await_end(), GuestEnd::Reset(ResetCause::TripleFault));
        vm = running.pause().unwrap();
        vm.reset().unwrap();
        assert_eq!(still(vm.save().unwrap()), fresh);
    }
}

/// A machine that was restored has no power-on state of its guest: it takes its own.
#[test]
fn a_guest_that_was_moved_is_reset_where_it_is_and_keeps_its_count() {
    if !kvm_or_skip() {
        return;
    }
    let (vm, test) = machine(1, MESS);
    let mut old = run_to_reset(vm, &test);
    old.reset().unwrap();
    let old = run_to_reset(old, &test);
    let saved = old.save().unwrap().encode().unwrap();
    let (builder, there) = TestVm::builder(1);
    let mut new = builder.incoming(images(MESS)).unwrap();
    copy_ram(old.handle().memory(), new.handle().memory());
    new.restore(MachineState::decode(&saved).unwrap()).unwrap();
    old.end();
    assert_eq!(new.resets(), 1);
    new.reset().unwrap();
    let mut new = run_to_reset(new, &there);
    new.reset().unwrap();
    assert_eq!(new.resets(), 3);
    assert_eq!(there.console.recent(), b"mmm", "two of them printed here");
    let (new, again) = moved(&new, 1);
    let new = run_to_reset(new, &again);
    assert_eq!(new.resets(), 3);
}

/// A migration copies while a guest is reset: the other side must get the cleared memory, too.
#[test]
fn every_page_is_dirty_after_a_reset() {
    if !kvm_or_skip() {
        return;
    }
    let (vm, test) = machine(1, MESS);
    let dirty = Arc::clone(vm.handle().dirty());
    dirty.start().unwrap();
    let all = dirty.fetch().unwrap();
    dirty.clear(0, 0, all.words(0)).unwrap();
    let mut vm = run_to_reset(vm, &test);
    let written = dirty.fetch().unwrap();
    dirty.clear(0, 0, written.words(0)).unwrap();
    assert!(written.count() < 16);
    vm.reset().unwrap();
    assert_eq!(dirty.fetch().unwrap().count(), 16 * 256);
    assert!(dirty.fetch().unwrap().count() < 256, "once");
}

#[test]
fn a_machine_whose_images_cannot_be_read_is_left_as_it_is() {
    if !kvm_or_skip() {
        return;
    }
    let (builder, test) = TestVm::builder(1);
    let first = std::sync::atomic::AtomicBool::new(true);
    let kernel = images(MESS);
    let open = move || match first.swap(false, std::sync::atomic::Ordering::SeqCst) {
        true => kernel(),
        false => Err("boot.kernel: cannot be read".into()),
    };
    let vm = builder.boot(Box::new(open)).unwrap();
    let mut vm = run_to_reset(vm, &test);
    let before = (vm.save().unwrap().vcpus[0].regs.clone(), ram(&vm));
    let error = vm.reset().unwrap_err();
    assert_eq!(error.to_string(), "boot.kernel: cannot be read");
    assert!((vm.save().unwrap().vcpus[0].regs.clone(), ram(&vm)) == before);
    assert_eq!(vm.resets(), 0);
}
