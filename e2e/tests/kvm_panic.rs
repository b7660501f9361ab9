//! The kernel of the probe guest panics, at home and after it has moved.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use bascule_e2e::{MovableGuest, TwoNodes, kvm_or_skip, wait_for};
use bascule_ipc::vm::{Panic, PanicStatus, Request, VmState};
use bascule_types::{Epoch, OnPanic};

const SOON: Duration = Duration::from_secs(60);

/// Two nodes with a VM of this policy, whose guest changes so little that a slow copy of it ends.
fn lab(policy: OnPanic) -> TwoNodes {
    let mut lab = TwoNodes::new("tick_ms=5 fill=16M").unwrap();
    lab.vm = lab.vm.configured(|config| config.on_panic = policy);
    lab
}

fn panics(guest: &mut MovableGuest) -> PanicStatus {
    guest.vm.status().unwrap().panics
}

fn panicked(count: u32, present: Panic) -> PanicStatus {
    let present = Some(present);
    PanicStatus { count, present }
}

/// Waits until the guest has told its panic.
fn await_panic(guest: &mut MovableGuest, told: PanicStatus) {
    wait_for("the panic", SOON, || {
        Ok((guest.vm.status()?.panics == told).then_some(()))
    })
    .unwrap();
}

#[test]
fn a_guest_that_panics_reboots_in_its_process_and_ownership_also_after_it_has_moved() {
    if !kvm_or_skip(
        "a_guest_that_panics_reboots_in_its_process_and_ownership_also_after_it_has_moved",
    ) {
        return;
    }
    let lab = lab(OnPanic::Restart);
    let network = &lab.cluster.network;
    let mut guest = lab.boot(&lab.vm).unwrap();
    guest.reset(network, "panic", 1).unwrap();
    guest.check().unwrap();
    assert_eq!(lab.epoch().unwrap(), Epoch(1), "the ownership is untouched");
    let reset = |count| PanicStatus {
        count,
        present: None,
    };
    assert_eq!(panics(&mut guest), reset(1));

    lab.migrate(&mut guest).unwrap();
    assert_eq!(panics(&mut guest), reset(1), "it is counted on");
    guest.reset(network, "panic", 2).unwrap();
    guest.check().unwrap();
    assert_eq!(panics(&mut guest), reset(2));
}

/// It is like any other reset: all of its memory is changed under the copy.
#[test]
fn a_guest_that_panics_during_the_pre_copy_of_its_migration_reboots_and_arrives() {
    if !kvm_or_skip("a_guest_that_panics_during_the_pre_copy_of_its_migration_reboots_and_arrives")
    {
        return;
    }
    let lab = lab(OnPanic::Restart);
    let mut guest = lab.boot(&lab.vm).unwrap();
    wait_for("the guest to have filled its memory", SOON, || {
        Ok((guest.session.clean_report()?.mem_checked > 0).then_some(()))
    })
    .unwrap();
    let mut destination = lab.begin_slowly(&mut guest).unwrap();
    guest.reset(&lab.cluster.network, "panic", 1).unwrap();
    guest.wait_arrival(&mut destination).unwrap();
    let arrived = destination.status().unwrap();
    assert_eq!((arrived.panics.count, arrived.panics.present), (1, None));
    assert_eq!(arrived.resets.count, 1);
    guest.check().unwrap();
}

#[test]
fn a_panicked_guest_that_is_to_be_left_runs_on_wherever_it_moves_until_it_is_reset() {
    if !kvm_or_skip(
        "a_panicked_guest_that_is_to_be_left_runs_on_wherever_it_moves_until_it_is_reset",
    ) {
        return;
    }
    let lab = lab(OnPanic::Leave);
    let mut guest = lab.boot(&lab.vm).unwrap();
    let left = panicked(1, Panic::Panicked);
    // During the pre-copy, and told again.
    let mut destination = lab.begin_slowly(&mut guest).unwrap();
    guest.session.command("panic and go on").unwrap();
    await_panic(&mut guest, left);
    guest.session.command("panic and go on").unwrap();
    guest.wait_arrival(&mut destination).unwrap();
    guest.vm.exit(SOON).unwrap();
    (guest.vm, guest.at) = (destination, 1);
    assert_eq!(panics(&mut guest), left);
    guest.check().unwrap();

    // Through the volume.
    lab.save(&mut guest, Some(lab.nodes[0].owner().unwrap()))
        .unwrap();
    guest.vm.exit(SOON).unwrap();
    lab.restore(&mut guest, 0, lab.epoch().unwrap()).unwrap();
    guest.vm.wait_state(&VmState::Running, SOON).unwrap();
    assert_eq!(panics(&mut guest), left);
    guest.check().unwrap();
    assert_eq!(guest.vm.status().unwrap().resets.count, 0);

    guest.console.expect_reset();
    guest.vm.must(&Request::Reset).unwrap();
    guest.vm.wait_resets(1, SOON).unwrap();
    let reset = PanicStatus {
        count: 1,
        present: None,
    };
    assert_eq!(panics(&mut guest), reset);
}

#[test]
fn a_guest_whose_crash_kernel_saves_its_memory_is_reset_by_nobody_else() {
    if !kvm_or_skip("a_guest_whose_crash_kernel_saves_its_memory_is_reset_by_nobody_else") {
        return;
    }
    let lab = lab(OnPanic::Restart);
    let network = &lab.cluster.network;
    let mut guest = lab.boot(&lab.vm).unwrap();
    guest.session.command("kdump").unwrap();
    let dumping = panicked(1, Panic::CrashLoaded);
    await_panic(&mut guest, dumping);
    // It may be drained meanwhile.
    lab.migrate(&mut guest).unwrap();
    assert_eq!(panics(&mut guest), dumping);
    guest.check().unwrap();
    assert_eq!(guest.vm.status().unwrap().resets.count, 0);
    guest.reset(network, "reset", 1).unwrap();
    assert_eq!(panics(&mut guest).present, None);

    // A crash kernel that panics itself saves nothing any more.
    guest.session.command("kdump").unwrap();
    await_panic(&mut guest, panicked(2, Panic::CrashLoaded));
    guest.reset(network, "panic", 2).unwrap();
    assert_eq!(panics(&mut guest).count, 3);
}
