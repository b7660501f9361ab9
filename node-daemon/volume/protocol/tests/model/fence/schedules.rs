//! The schedules of a takeover that are searched.

use bascule_volume_format::{Fencing, WatchdogKind};
use bascule_volume_protocol::Rules;

use super::FenceModel;
use crate::checker::{Size, holds};

#[test]
fn i1_no_write_lands_after_a_later_epochs_first_under_a_hardware_watchdog() {
    let model = FenceModel {
        ticks: Size::from_environment().pick(9, 11),
        ..FenceModel::new(Rules::ENFORCED)
    };
    holds("fence, hardware watchdog", model);
}

#[test]
fn i1_no_write_lands_after_a_later_epochs_first_through_power_cut_and_reboot() {
    let model = FenceModel {
        ticks: Size::from_environment().pick(4, 6),
        settle: 2,
        power_cut: true,
        reboots: 1,
        late_pets: false,
        ..FenceModel::new(Rules::ENFORCED)
    };
    holds("fence, power cut and reboot", model);
}

#[test]
fn i1_a_killed_guests_vm_is_not_released_until_its_writes_have_landed() {
    let model = FenceModel {
        ticks: Size::from_environment().pick(5, 9),
        kill: true,
        late_pets: false,
        ..FenceModel::new(Rules::ENFORCED)
    };
    holds("fence, killed guest", model);
}

#[test]
fn i1_a_softdog_and_no_watchdog_prove_nothing() {
    let size = Size::from_environment();
    let both = [WatchdogKind::Software, WatchdogKind::None];
    for kind in both.into_iter().take(size.pick(1, 2)) {
        let model = FenceModel {
            ticks: size.pick(9, 10),
            kind,
            late_pets: false,
            ..FenceModel::new(Rules::ENFORCED)
        };
        holds("fence, no hardware watchdog", model);
    }
}

#[test]
fn i1_lease_only_takes_over_only_after_a_confirmation_of_this_generation() {
    let model = FenceModel {
        ticks: Size::from_environment().pick(4, 5),
        watch: 3,
        kind: WatchdogKind::None,
        fencing: Fencing::LeaseOnly,
        power_cut: true,
        reboots: 1,
        late_pets: false,
        ..FenceModel::new(Rules::ENFORCED)
    };
    holds("fence, administrator's confirmation", model);
}

#[test]
fn i1_a_volume_that_is_withdrawn_when_its_lease_lapses_has_nothing_in_flight() {
    let model = FenceModel {
        ticks: Size::from_environment().pick(8, 9),
        failing_writes: true,
        ..FenceModel::withdrawing(Rules::ENFORCED)
    };
    holds("fence, withdrawn on lapse", model);
}

#[test]
fn i1_a_watchdog_that_does_not_answer_keeps_the_gates_closed_while_it_is_counted_on() {
    let model = FenceModel {
        ticks: Size::from_environment().pick(8, 9),
        silent_watchdog: true,
        ..FenceModel::withdrawing(Rules::ENFORCED)
    };
    holds("fence, silent watchdog", model);
}
