use super::*;

const NODE: NodeUid = NodeUid::from_bytes([1; 16]);
const SLOT: SlotId = SlotId(3);

fn at(ms: u64) -> BootTime {
    BootTime(0).after(Duration::from_millis(ms))
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn owner(generation: u64) -> Owner {
    Owner {
        slot: SLOT,
        generation: Generation(generation),
    }
}

fn seen(generation: u64, sequence: u64) -> HeartbeatSeen {
    HeartbeatSeen {
        node: NODE,
        owner: owner(generation),
        sequence,
        watchdog: WatchdogKind::Hardware,
        detached: false,
        timings: Timings::DEFAULT,
    }
}

fn read(watcher: Watcher, issued: u64, completed: u64, record: HeartbeatSeen) -> Watcher {
    watcher.next(WatchEvent::Read {
        issued_at: at(issued),
        completed_at: at(completed),
        slots: vec![(SLOT, Some(record))],
    })
}

fn watching(record: HeartbeatSeen) -> Watcher {
    read(Watcher::new(Rules::ENFORCED), 0, 100, record)
}

#[test]
fn r4_r5_the_interval_lasts_from_a_completed_read_to_an_issued_one() {
    let watcher = watching(seen(1, 1));
    assert_eq!(watcher.evidence(owner(1)).unchanged_for, Duration::ZERO);
    let watcher = read(watcher, 1100, 5000, seen(1, 1));
    assert_eq!(watcher.evidence(owner(1)).unchanged_for, ms(1000));
}

#[test]
fn r5_a_read_that_was_issued_before_the_value_was_first_seen_confirms_nothing() {
    let watcher = read(watching(seen(1, 1)), 50, 9000, seen(1, 1));
    assert_eq!(watcher.evidence(owner(1)).unchanged_for, Duration::ZERO);
}

#[test]
fn any_difference_starts_the_interval_anew_even_a_step_back() {
    for other in [seen(1, 3), seen(1, 1), seen(2, 2)] {
        let watcher = read(watching(seen(1, 2)), 20_000, 20_000, seen(1, 2));
        assert!(watcher.evidence(owner(1)).lease_is_over());
        let watcher = read(watcher, 21_000, 21_000, other);
        assert!(!watcher.evidence(owner(1)).lease_is_over(), "{other:?}");
    }
}

#[test]
fn a_lease_is_over_after_the_victims_own_w_and_not_before() {
    let watcher = watching(seen(1, 1));
    let before = read(watcher.clone(), 12_099, 12_099, seen(1, 1));
    assert!(!before.evidence(owner(1)).lease_is_over());
    let after = read(watcher, 12_100, 12_100, seen(1, 1));
    assert!(after.evidence(owner(1)).lease_is_over());

    let mut slower = seen(1, 1);
    slower.timings.watch = Duration::from_secs(60);
    let watcher = read(watching(slower), 12_100, 12_100, slower);
    assert!(!watcher.evidence(owner(1)).lease_is_over());
}

#[test]
fn an_unread_slot_and_a_future_generation_prove_nothing() {
    let watcher = read(watching(seen(1, 1)), 60_000, 60_000, seen(1, 1));
    for victim in [
        owner(2),
        Owner {
            slot: SlotId(9),
            generation: Generation(1),
        },
    ] {
        let evidence = watcher.evidence(victim);
        assert_eq!(evidence.standing, Standing::Unknown);
        assert!(!evidence.lease_is_over());
    }
}

#[test]
fn a_generation_that_the_journal_names_is_watched_from_that_moment() {
    let watcher = watching(seen(1, 1)).next(WatchEvent::Granted {
        now: at(20_000),
        owner: owner(2),
    });
    let watcher = read(watcher, 30_000, 30_000, seen(1, 1));
    let evidence = watcher.evidence(owner(2));
    assert_eq!(evidence.standing, Standing::GrantedOnly);
    assert_eq!(evidence.unchanged_for, ms(10_000));
}

#[test]
fn a_superseded_generation_has_no_heartbeat_for_as_long_as_its_node() {
    let watcher = read(watching(seen(1, 1)), 20_000, 20_000, seen(2, 1));
    assert_eq!(watcher.evidence(owner(1)).standing, Standing::Superseded);
    assert!(!watcher.evidence(owner(1)).lease_is_over());
    let watcher = read(watcher, 40_000, 40_000, seen(2, 1));
    assert!(watcher.evidence(owner(1)).lease_is_over());
}

#[test]
fn only_a_recent_heartbeat_of_this_very_generation_is_alive() {
    let watcher = watching(seen(2, 1));
    assert!(watcher.is_alive(owner(2), at(12_099)));
    assert!(!watcher.is_alive(owner(2), at(12_100)));
    assert!(!watcher.is_alive(owner(1), at(200)));
    let mut left = seen(2, 2);
    left.detached = true;
    let watcher = read(watcher, 300, 300, left);
    assert!(!watcher.is_alive(owner(2), at(301)));
}

/// What the operator suspects a node by.
#[test]
fn a_node_may_hold_its_lease_until_one_lease_after_its_last_heartbeat_was_seen() {
    let polled_until = |until: u64| {
        (1..=until / 500).fold(watching(seen(1, 1)), |watcher, poll| {
            read(watcher, 500 * poll + 100, 500 * poll + 110, seen(1, 1))
        })
    };
    let lease = Timings::DEFAULT.lease;
    let seen_at = at(100);
    for before in [0, 500, 3999] {
        assert!(polled_until(before).may_hold_lease(owner(1), seen_at.after(ms(before))));
    }
    let watcher = polled_until(4_000);
    assert!(!watcher.may_hold_lease(owner(1), seen_at.after(lease)));
    // No election, grant or takeover follows from that: W has not passed.
    assert!(watcher.is_alive(owner(1), seen_at.after(lease)));
    assert!(!watcher.evidence(owner(1)).lease_is_over());
    let renewed = read(watcher, 4_600, 4_610, seen(1, 2));
    assert!(renewed.may_hold_lease(owner(1), at(4_700)));
}

/// A storage that stalls for this node makes no other node suspect: its renewals are not seen either.
#[test]
fn a_node_that_was_not_looked_at_may_hold_its_lease() {
    let stalled = read(watching(seen(1, 1)), 600, 9_000, seen(1, 1));
    assert!(stalled.may_hold_lease(owner(1), at(9_000)));
    let next = read(stalled, 9_500, 9_510, seen(1, 1));
    assert!(!next.may_hold_lease(owner(1), at(9_510)));
}

#[test]
fn no_lease_is_held_by_a_node_that_left_or_in_another_generation() {
    let watcher = watching(seen(2, 1));
    assert!(watcher.may_hold_lease(owner(2), at(200)));
    for other in [owner(1), owner(3)] {
        assert!(!watcher.may_hold_lease(other, at(200)), "{other}");
    }
    let mut left = seen(2, 2);
    left.detached = true;
    assert!(!read(watcher, 300, 300, left).may_hold_lease(owner(2), at(301)));
}
