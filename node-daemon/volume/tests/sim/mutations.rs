//! Each hole that was once open, and each rule of the drivers, broken: the simulation finds it.
//!
//! `UnwatchedWhileNamed` was not found: a guest must open its VM again before it writes in a new generation,
//! and that waits for the same record. Nor is `GateOpensBeforeEnlisting`, within the seeds of a test: a guest
//! would have to open its VM again while a deaf watchdog lets the enlistment wait. The model finds both.

use bascule_devices::disk::{Mutation as DiskMutation, Rules as DiskRules};
use bascule_volume_protocol::{Mutation, Rules};

use crate::profile::Kind;
use crate::{Setup, number, run, sound};

const fn broken(profile: Kind, mutation: Mutation) -> Setup {
    Setup {
        rules: Rules::without(mutation),
        ..sound(profile)
    }
}

const fn broken_disk(profile: Kind, mutation: DiskMutation) -> Setup {
    Setup {
        disk_rules: DiskRules::without(mutation),
        ..sound(profile)
    }
}

/// A seed of the profile's first [`SEEDS`] finds it, or `known`. A change of the drivers changes which: search with
/// `BASCULE_SIM_FROM` and `BASCULE_SIM_SEEDS`.
fn is_found(name: &str, known: u64, setup: Setup) {
    let most = number("BASCULE_SIM_SEEDS").unwrap_or(SEEDS);
    let from = number("BASCULE_SIM_FROM").unwrap_or(0);
    let seeds = std::iter::once(known).chain(from..from + most);
    let mut failures = seeds.filter_map(|seed| Some((seed, run(seed, setup).err()?)));
    let found = failures.next();
    println!("{name}: {found:?}");
    assert!(found.is_some(), "{name} is not found");
}

const SEEDS: u64 = 40;

#[test]
fn a_lock_that_says_that_a_dead_writer_has_nothing_in_flight_is_found() {
    let setup = Setup {
        lock_lies: true,
        ..sound(Kind::Mixed)
    };
    is_found("lock lies", 4, setup);
}

#[test]
fn a_watchdog_that_does_not_fire_is_found() {
    let setup = Setup {
        no_watchdog: true,
        ..sound(Kind::Mixed)
    };
    is_found("no watchdog", 22, setup);
}

#[test]
fn obsolete_damage_that_stops_coordination_is_found() {
    let setup = Setup {
        old_damage_counts: true,
        ..sound(Kind::Damage)
    };
    is_found("old damage counts", 0, setup);
}

#[test]
fn going_back_from_a_damaged_block_is_found() {
    let setup = Setup {
        damages_newest: true,
        ..sound(Kind::Damage)
    };
    is_found("goes back", 4, setup);
}

/// A restart may add a keepalive, the kernel's when the last descriptor is closed, as a process that was frozen may:
/// a timeout that leaves no room for it counts.
#[test]
fn a_late_keepalive_that_the_safe_time_does_not_count_is_found() {
    let setup = Setup {
        watchdog_seconds: 10,
        ..broken(Kind::WatchdogRestarts, Mutation::LateKeepaliveNotCounted)
    };
    is_found("LateKeepaliveNotCounted", 0, setup);
}

#[test]
fn a_failed_write_of_a_guest_that_counts_as_ended_is_found() {
    is_found(
        "FailedWriteEnds",
        1,
        broken_disk(Kind::FailedWrites, DiskMutation::FailedWriteEnds),
    );
}

#[test]
fn a_guests_write_over_one_that_failed_and_may_land_is_found() {
    is_found(
        "OverlapBeforeSettle",
        0,
        broken_disk(Kind::LostPaths, DiskMutation::OverlapBeforeSettle),
    );
}

/// One test for each, so that they run side by side.
macro_rules! found {
    ($($name:ident: $profile:ident, $mutation:ident, $known:literal;)*) => {$(
        #[test]
        fn $name() {
            let setup = broken(Kind::$profile, Mutation::$mutation);
            is_found(stringify!($mutation), $known, setup);
        }
    )*};
}

found! {
    petting_without_a_lease_is_found: Mixed, PetWithoutLease, 7;
    withdrawing_with_writes_in_flight_is_found: Mixed, WithdrawBeforeDrain, 2;
    withdrawing_only_when_writers_close_is_found: Returns, WithdrawOnlyClosed, 2;
    withdrawing_a_lapsed_volume_in_flight_is_found: Mixed, WithdrawLapsedInFlight, 2;
    an_unclean_writer_that_counts_as_drained_is_found: FailedWrites, UncleanCountsAsDrained, 3;
    a_takeover_without_a_fence_is_found: Mixed, TakeOverWithoutFence, 2;
    a_takeover_before_the_settle_time_is_found: LateResets, SafeTimeWithoutSettle, 13;
    a_takeover_in_the_same_epoch_is_found: Mixed, TakeOverKeepsEpoch, 0;
    a_fenced_node_that_keeps_its_vms_is_found: Returns, RejoinKeepsFencedRows, 2;
    a_living_node_that_is_confirmed_dead_is_found: Returns, UnseenCountsAsOver, 0;
    a_full_table_that_blocks_takeover_is_found: FullTable, NoReservedRows, 1;
    a_late_duplicate_that_drops_a_saved_state_is_found: SavedStates, SavedStateUnbound, 7;
    an_answer_without_a_re_read_is_found: Mixed, AnswerWithoutReread, 54;
    a_forgotten_failed_write_is_found: Elections, ForgetFailedWrites, 0;
    a_paxos_block_that_is_reused_too_early_is_found: Elections, ReuseBeforeSettle, 9;
    a_writer_that_opens_unwatched_is_found: DeafWatchdog, OpenBeforePublished, 6;
    a_withdrawal_that_undoes_a_later_enlistment_is_found: LateAnswers, OutdatedRequestCounts, 0;
    a_keepalive_on_adoption_is_found: WatchdogRestarts, KeepaliveOnAdoption, 2;
    a_timeout_that_is_set_again_is_found: WatchdogRestarts, TimeoutSetAgain, 2;
    a_device_that_is_opened_before_deciding_is_found: WatchdogRestarts, OpenBeforeDeciding, 35;
    a_device_without_a_second_holder_is_found: WatchdogRestarts, NoSecondHolder, 55;
}
