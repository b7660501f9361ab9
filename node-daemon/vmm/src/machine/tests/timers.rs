//! The guest's timers, as a guest reads them.

use std::time::Duration;

use super::*;
use crate::clock::{HostClock, ManualClock};
use crate::testing::{CLOCK, PM_TIMER};

/// A machine whose host's clocks stand where `clock` says.
fn at(clock: &Arc<ManualClock>) -> (crate::VmBuilder, TestVm) {
    let (builder, test) = TestVm::builder(1);
    let clock = Arc::clone(clock) as Arc<dyn HostClock>;
    (builder.with_clock(clock), test)
}

/// All whole registers of four bytes that the guest has printed.
fn printed(test: &TestVm) -> Vec<u32> {
    let output = test.console.recent();
    let registers = output.chunks_exact(4);
    registers
        .map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap()))
        .collect()
}

#[test]
fn a_guest_reads_the_power_management_timer_and_finds_it_again_where_it_moves() {
    if !kvm_or_skip() {
        return;
    }
    let here = ManualClock::at(Duration::from_secs(9), Duration::ZERO);
    let (builder, first) = at(&here);
    let vm = builder.boot(images(PM_TIMER)).unwrap();
    here.advance(Duration::from_secs(2));
    let vm = vm.run().unwrap();
    first.await_output(40);
    let old = vm.pause().unwrap();
    let seen = printed(&first);
    assert!(seen.iter().all(|ticks| *ticks == 2 * 3_579_545), "{seen:?}");
    let saved = old.save().unwrap().encode().unwrap();
    let there = ManualClock::at(Duration::from_secs(500), Duration::ZERO);
    let (builder, second) = at(&there);
    let mut new = builder.incoming(images(PM_TIMER)).unwrap();
    copy_ram(old.handle().memory(), new.handle().memory());
    new.restore(MachineState::decode(&saved).unwrap()).unwrap();
    there.advance(Duration::from_secs(1));
    let before = first.console.recent().len();
    let new = new.run().unwrap();
    second.await_output(first.written() + 40);
    drop(new.pause().unwrap());
    // Without the register that was being printed, and the one that was read already.
    let after = printed(&second).split_off(before / 4 + 2);
    assert!(
        after.iter().all(|ticks| *ticks == 3 * 3_579_545),
        "{after:?}"
    );
}

#[test]
fn a_guest_reads_the_hosts_time() {
    if !kvm_or_skip() {
        return;
    }
    let now = Duration::from_secs(1_795_876_507);
    let (builder, test) = at(&ManualClock::at(Duration::ZERO, now));
    let vm = builder.boot(images(CLOCK)).unwrap().run().unwrap();
    test.await_output(7);
    drop(vm.pause().unwrap());
    let output = test.console.recent();
    assert_eq!(output[..7], [0x07, 0x35, 0x14, 0x28, 0x11, 0x26, 0x20]);
}
