//! The controller against a synthetic guest that dirties a working set at a rate.

use super::*;
use proptest::prelude::*;

const FIXED: FixedCost = FixedCost {
    save: Duration::from_millis(1),
    restore: Duration::from_millis(2),
    commit: Duration::from_millis(2),
    round_trip: Duration::from_micros(200),
    state: Bytes(64 << 10),
};

const LIMITS: Limits = Limits {
    downtime_max: Duration::from_millis(300),
    time_max: Duration::from_secs(120),
    rounds_max: 60,
    rate_max: None,
    fallback: Fallback::Fail,
};

/// A guest that writes random pages of its working set.
#[derive(Clone, Copy, Debug)]
struct Guest {
    memory: Pages,
    working_set: Pages,
    dirties_per_second: u64,
    link: Rate,
}

#[derive(Debug)]
struct Outcome {
    decision: Decision,
    /// What the blackout would really be.
    blackout: Duration,
    elapsed: Duration,
    sent: Bytes,
    rounds: u32,
}

impl Guest {
    fn dirtied_in(&self, time: Duration) -> Pages {
        let writes = u128::from(self.dirties_per_second) * time.as_nanos() / 1_000_000_000;
        Pages(
            u64::try_from(writes)
                .unwrap_or(u64::MAX)
                .min(self.working_set.0),
        )
    }

    fn migrate(&self, limits: Limits) -> Outcome {
        let mut controller = Controller::new(limits);
        let mut dirty = self.memory;
        let (mut elapsed, mut sent) = (Duration::ZERO, Bytes(0));
        for rounds in 1..10_000 {
            let bytes = Bytes(dirty.0 * (PAGE_BYTES + 16));
            let took = self.link.time_for(bytes) + FIXED.round_trip;
            elapsed += took;
            sent.0 += bytes.0;
            dirty = self.dirtied_in(took);
            let round = Round {
                sent: bytes,
                took,
                paced: Duration::ZERO,
                dirty,
            };
            let decision = controller.round_ended(&round, &FIXED, elapsed);
            if decision != Decision::NextRound {
                let last = Bytes(dirty.0 * (PAGE_BYTES + 16));
                return Outcome {
                    decision,
                    blackout: self.link.time_for(last) + FIXED.total(self.link),
                    elapsed,
                    sent,
                    rounds,
                };
            }
        }
        panic!("the controller never decided: {self:?}");
    }
}

const fn idle() -> Guest {
    Guest {
        memory: Pages(1 << 19),
        working_set: Pages(1024),
        dirties_per_second: 1000,
        link: Rate(1 << 30),
    }
}

#[test]
fn an_idle_guest_stops_near_the_fixed_cost() {
    let outcome = idle().migrate(LIMITS);
    assert!(
        matches!(outcome.decision, Decision::Stop { .. }),
        "{outcome:?}"
    );
    assert!(outcome.blackout < Duration::from_millis(10), "{outcome:?}");
    assert!(outcome.rounds <= 4, "{outcome:?}");
}

#[test]
fn polishing_shortens_a_blackout_that_the_limit_would_have_allowed() {
    let guest = Guest {
        working_set: Pages(1 << 16),
        dirties_per_second: 20_000,
        ..idle()
    };
    let outcome = guest.migrate(LIMITS);
    let limit_alone = guest.link.time_for(Bytes(40_000 * PAGE_BYTES));
    assert!(outcome.blackout < limit_alone / 4, "{outcome:?}");
}

#[test]
fn a_guest_that_writes_faster_than_the_link_does_not_converge() {
    for fallback in [Fallback::Quick, Fallback::Fail] {
        let guest = Guest {
            working_set: Pages(1 << 18),
            dirties_per_second: 10_000_000,
            ..idle()
        };
        let outcome = guest.migrate(Limits { fallback, ..LIMITS });
        let Decision::DoesNotConverge {
            fallback: chosen,
            cause,
            predicted,
        } = outcome.decision
        else {
            panic!("{outcome:?}");
        };
        assert_eq!(chosen, fallback);
        assert_eq!(cause, Exhausted::NoProgress);
        assert!(predicted > LIMITS.downtime_max);
        assert!(outcome.rounds < 10, "{outcome:?}");
    }
}

#[test]
fn a_large_working_set_that_fits_the_limit_is_moved() {
    let guest = Guest {
        working_set: Pages(1 << 16),
        dirties_per_second: 10_000_000,
        link: Rate(2 << 30),
        ..idle()
    };
    let outcome = guest.migrate(LIMITS);
    assert!(
        matches!(outcome.decision, Decision::Stop { .. }),
        "{outcome:?}"
    );
    assert!(outcome.blackout <= LIMITS.downtime_max, "{outcome:?}");
}

#[test]
fn a_limit_below_the_fixed_cost_is_reported_and_not_tried() {
    let limits = Limits {
        downtime_max: Duration::from_millis(2),
        ..LIMITS
    };
    let outcome = idle().migrate(limits);
    assert!(
        matches!(outcome.decision, Decision::DoesNotConverge { .. }),
        "{outcome:?}"
    );
}

#[test]
fn one_delay_while_the_fixed_cost_is_measured_does_not_rule_the_move_out() {
    let mut controller = Controller::new(LIMITS);
    let mut fixed = FixedCost::default();
    assert!(controller.begin_dry_run(&fixed), "the first round measures");
    // The coordinator took 200 ms to answer: with the two reads of a transfer, more than the limit.
    fixed = FixedCost {
        commit: Duration::from_millis(400),
        ..FIXED
    };
    let round = Round {
        sent: Bytes(64 << 20),
        took: Duration::from_millis(64),
        paced: Duration::ZERO,
        dirty: Pages(8),
    };
    let decision = controller.round_ended(&round, &fixed, round.took);
    assert_eq!(decision, Decision::NextRound);
    assert!(controller.begin_dry_run(&fixed), "and the next one again");
    fixed.improve(&FIXED);
    assert!(!controller.begin_dry_run(&fixed), "it is short enough now");
    let decision = controller.round_ended(&round, &fixed, round.took * 2);
    assert!(matches!(decision, Decision::Stop { .. }), "{decision:?}");
}

#[test]
fn a_delay_in_a_later_measurement_changes_nothing() {
    let mut fixed = FIXED;
    fixed.improve(&FixedCost {
        save: Duration::from_secs(1),
        commit: Duration::from_secs(1),
        round_trip: Duration::from_secs(1),
        ..FIXED
    });
    assert_eq!(fixed, FIXED);
}

#[test]
fn a_fixed_cost_above_the_limit_is_not_measured_for_ever() {
    let mut controller = Controller::new(LIMITS);
    let fixed = FixedCost {
        save: Duration::from_secs(1),
        ..FIXED
    };
    let measured = (0..100).filter(|_| controller.begin_dry_run(&fixed));
    assert_eq!(measured.count(), 5);
}

#[test]
fn short_rounds_of_one_burst_are_not_taken_for_a_guest_that_never_converges() {
    let mut controller = Controller::new(LIMITS);
    let burst = Round {
        sent: Bytes(512 << 20),
        took: Duration::from_millis(100),
        paced: Duration::ZERO,
        dirty: Pages(1 << 20),
    };
    for round in 1..=10 {
        let decision = controller.round_ended(&burst, &FIXED, burst.took * round);
        assert_eq!(decision, Decision::NextRound, "round {round}");
    }
    let calm = Round {
        dirty: Pages(8),
        ..burst
    };
    let decision = controller.round_ended(&calm, &FIXED, burst.took * 11);
    assert_ne!(
        std::mem::discriminant(&decision),
        std::mem::discriminant(&Decision::DoesNotConverge {
            fallback: Fallback::Fail,
            predicted: Duration::ZERO,
            cause: Exhausted::NoProgress
        }),
        "{decision:?}"
    );
}

#[test]
fn the_time_budget_ends_a_slow_copy() {
    let guest = Guest {
        link: Rate(10 << 20),
        working_set: Pages(1 << 19),
        dirties_per_second: 2_000,
        ..idle()
    };
    let outcome = guest.migrate(LIMITS);
    let Decision::DoesNotConverge { cause, .. } = outcome.decision else {
        panic!("{outcome:?}");
    };
    assert_eq!(cause, Exhausted::Time);
}

#[test]
fn a_capped_round_does_not_make_the_link_look_slow() {
    let mut controller = Controller::new(LIMITS);
    let round = Round {
        sent: Bytes(1 << 30),
        took: Duration::from_secs(10),
        paced: Duration::from_secs(9),
        dirty: Pages(0),
    };
    let decision = controller.round_ended(&round, &FIXED, Duration::from_secs(10));
    assert!(matches!(decision, Decision::Stop { .. }));
    assert_eq!(controller.rate(), Rate(1 << 30));
}

#[test]
fn the_pacer_spreads_what_is_sent() {
    let mut pacer = Pacer::new(Some(Rate(1_000_000)));
    let mut now = Duration::from_secs(5);
    let start = now;
    for _ in 0..1000 {
        now += pacer.sent(Bytes(10_000), now);
    }
    let took = now - start;
    assert!(took >= Duration::from_millis(9_970), "{took:?}");
    assert!(took <= Duration::from_millis(10_000), "{took:?}");
    assert_eq!(Pacer::new(None).sent(Bytes(u64::MAX), now), Duration::ZERO);
}

proptest! {
    #[test]
    fn the_controller_always_ends_within_its_budgets(
        memory in 1_000..1_000_000u64,
        share in 1..=100u64,
        dirties_per_second in 0..5_000_000u64,
        link in (1u64 << 20)..(8u64 << 30),
    ) {
        let guest = Guest {
            memory: Pages(memory),
            working_set: Pages(memory * share / 100),
            dirties_per_second,
            link: Rate(link),
        };
        let outcome = guest.migrate(LIMITS);
        prop_assert!(outcome.rounds <= LIMITS.rounds_max);
        prop_assert!(outcome.sent.0 >= memory * PAGE_BYTES);
        // A round that began within the budget may end beyond it.
        let longest = guest.link.time_for(Bytes(memory * (PAGE_BYTES + 16)));
        prop_assert!(outcome.elapsed <= LIMITS.time_max + 2 * longest + FIXED.round_trip * 2);
        if let Decision::Stop { predicted } = outcome.decision {
            prop_assert!(predicted <= LIMITS.downtime_max);
            // The synthetic link is steady. What too small rounds cannot measure is guessed.
            if guest.link >= RATE_GUESS {
                prop_assert!(outcome.blackout <= LIMITS.downtime_max, "{:?}", outcome);
            }
        }
    }

    #[test]
    fn a_guest_slower_than_half_the_link_is_always_moved(
        memory in 50_000..1_000_000u64,
        link in (256u64 << 20)..(8u64 << 30),
        share in 1..=100u64,
    ) {
        let guest = Guest {
            memory: Pages(memory),
            working_set: Pages(memory * share / 100),
            dirties_per_second: link / PAGE_BYTES / 3,
            link: Rate(link),
        };
        let outcome = guest.migrate(LIMITS);
        prop_assert!(matches!(outcome.decision, Decision::Stop { .. }), "{:?}", outcome);
    }
}
