use bascule_types::{Generation, NodeUid, Owner, SlotId};

use super::*;

const VICTIM: Owner = Owner {
    slot: SlotId(3),
    generation: Generation(7),
};

fn policy(mode: Fencing) -> FencePolicy {
    FencePolicy {
        mode,
        allowed: FencingPolicy::default(),
        rules: Rules::ENFORCED,
    }
}

fn evidence(kind: WatchdogKind, no_heartbeat_ms: u64) -> Evidence {
    Evidence {
        victim: VICTIM,
        standing: Standing::Shown,
        record: Some(HeartbeatSeen {
            node: NodeUid::from_bytes([1; 16]),
            owner: VICTIM,
            sequence: 1,
            watchdog: kind,
            detached: false,
            timings: Timings::DEFAULT,
        }),
        unchanged_for: Duration::from_millis(no_heartbeat_ms),
    }
}

fn under_watchdog(kind: WatchdogKind, no_heartbeat_ms: u64) -> Result<FenceProof, MissingProof> {
    verify(policy(Fencing::Watchdog), &evidence(kind, no_heartbeat_ms))
}

#[test]
fn the_safe_time_under_a_hardware_watchdog_is_a_proof_and_a_millisecond_less_is_none() {
    assert_eq!(
        under_watchdog(WatchdogKind::Hardware, 26_000),
        Ok(FenceProof::SafeTimeElapsed {
            watched_ms: 26_000,
            required_ms: 26_000
        })
    );
    assert_eq!(
        under_watchdog(WatchdogKind::Hardware, 25_999),
        Err(MissingProof::SafeTime {
            watched_ms: 25_999,
            required_ms: 26_000
        })
    );
}

#[test]
fn a_node_whose_heartbeat_rose_within_a_lease_is_alive() {
    let alive = Err(MissingProof::Alive);
    assert_eq!(under_watchdog(WatchdogKind::Hardware, 3_999), alive);
}

#[test]
fn i1_a_softdog_proves_nothing_unless_it_was_allowed() {
    let missing = Err(MissingProof::NoWatchdog);
    assert_eq!(under_watchdog(WatchdogKind::Software, 99_000), missing);
    assert_eq!(under_watchdog(WatchdogKind::None, 99_000), missing);

    let mut allowed = policy(Fencing::Watchdog);
    allowed.allowed.software_watchdog = true;
    assert!(verify(allowed, &evidence(WatchdogKind::Software, 26_000)).is_ok());
    let none = verify(allowed, &evidence(WatchdogKind::None, 26_000));
    assert_eq!(none, missing);
}

#[test]
fn i1_lease_only_and_unimplemented_reservations_need_an_administrators_confirmation() {
    for mode in [Fencing::LeaseOnly, Fencing::PersistentReservation] {
        let verdict = verify(policy(mode), &evidence(WatchdogKind::Hardware, 99_000));
        assert_eq!(verdict, Err(MissingProof::AdminConfirmation), "{mode:?}");
    }
}

#[test]
fn a_victim_without_a_heartbeat_record_needs_an_administrators_confirmation() {
    let unknown = Evidence {
        standing: Standing::Unknown,
        record: None,
        ..evidence(WatchdogKind::Hardware, 99_000)
    };
    let verdict = verify(policy(Fencing::Watchdog), &unknown);
    assert_eq!(verdict, Err(MissingProof::AdminConfirmation));
}

#[test]
fn the_victims_own_times_count() {
    let mut slow = evidence(WatchdogKind::Hardware, 26_000);
    if let Some(record) = &mut slow.record {
        record.timings.settle = Duration::from_secs(5);
    }
    let verdict = verify(policy(Fencing::Watchdog), &slow);
    assert_eq!(
        verdict,
        Err(MissingProof::SafeTime {
            watched_ms: 26_000,
            required_ms: 27_000
        })
    );
}
