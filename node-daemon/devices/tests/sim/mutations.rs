//! Each rule about errors, broken: the simulation finds it.

use bascule_devices::disk::{Mutation, Rules};

use crate::{number, run};

/// A seed of the first [`SEEDS`] finds it: `known` today. A change of the engine changes which.
fn is_found(mutation: Mutation, known: u64) {
    let most = number("BASCULE_SIM_SEEDS").unwrap_or(SEEDS);
    let rules = Rules::without(mutation);
    let seeds = std::iter::once(known).chain(0..most);
    let mut failures = seeds.filter_map(|seed| Some((seed, run(seed, rules).err()?)));
    let found = failures.next();
    println!("{mutation:?}: {found:?}");
    assert!(found.is_some(), "{mutation:?} is not found");
}

const SEEDS: u64 = 40;

/// One test for each, so that they run side by side.
macro_rules! found {
    ($($name:ident: $mutation:ident, $known:literal;)*) => {$(
        #[test]
        fn $name() {
            is_found(Mutation::$mutation, $known);
        }
    )*};
}

found! {
    an_io_error_that_is_shown_without_a_probe_is_found: EioWithoutProbe, 2;
    an_io_error_that_is_judged_by_one_probe_is_found: EioJudgedAtOnce, 2;
    an_io_error_that_is_always_a_lost_path_is_found: EioIsLostPath, 1;
    a_path_error_that_is_shown_is_found: PathErrorShown, 2;
    a_failed_write_that_counts_as_ended_is_found: FailedWriteEnds, 0;
    a_write_over_one_that_failed_and_may_land_is_found: OverlapBeforeSettle, 0;
}
