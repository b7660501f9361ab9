//! The real disk engine of several guests of one volume on one node, on one device that fails: with a simulated
//! clock, faults and device, all drawn from a seed.
//!
//! Faults: the path to the device is lost (what is under way fails, with the errors that Linux has for it or a plain
//! `EIO`, and so does what follows, until the path is back), places that cannot be read or written, writes that fail
//! at good places, and land within the settle time, stalls, short transfers, `EAGAIN`; gates that close; guests that
//! are paused, moved, killed, or whose node is reset.
//!
//! Checked at every step: a guest gets an error of a read or write only if the device refused that place of its own
//! disk, and none with `onError: Pause`, which holds its requests; so no lost path is shown, and no guest sees
//! another one's fault. A writer is unclean exactly if a write or flush of it failed, and its gate knows. No
//! acknowledged write is undone (I3), by none that failed either. No write passes a closed gate, nor is in flight when
//! the gate was told that none is (I1). Nobody waits without a reason. Checked at the end: with the faults gone every
//! request is answered.
//!
//! `BASCULE_SIM_SEEDS=1000 BASCULE_SIM_FROM=0` run more seeds, `BASCULE_SIM_SEED=7` one; `make soak` runs them after
//! the volume's.
//!
//! # Assumed
//! A write that failed lands within the settle time or never, as docs/adr/0006-what-ends-a-write.md has it of one
//! that fails after its process died. A path is lost again at the earliest a second after it came back.
//!
//! # Not simulated
//! The queues of the virtio device, which has no part in this, and a cache of the device: a flush has no effect.
//! An error of a flush is the guest's, whatever its cause (docs/adr/0010-what-a-disk-error-does.md).
#![expect(clippy::unwrap_used, reason = "fixtures of tests")]

mod device;
mod gate;
mod guest;
mod mutations;
mod oracle;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use bascule_devices::disk::Rules;

use crate::world::World;

/// What a run found: a digest of it, and how much was simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ran {
    pub(crate) digest: u64,
    pub(crate) nanos: u64,
    pub(crate) requests: u64,
}

/// The error is the first failed check.
fn run(seed: u64, rules: Rules) -> Result<Ran, String> {
    let ran = catch_unwind(AssertUnwindSafe(|| World::new(seed, rules).run()));
    ran.map_err(|payload| {
        let text = payload.downcast_ref::<String>().cloned();
        text.or_else(|| payload.downcast_ref::<&str>().map(ToString::to_string))
            .unwrap_or_else(|| "a panic".to_owned())
    })
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn seeds() -> std::ops::Range<u64> {
    if let Some(seed) = number("BASCULE_SIM_SEED") {
        return seed..seed + 1;
    }
    let from = number("BASCULE_SIM_FROM").unwrap_or(0);
    from..from + number("BASCULE_SIM_SEEDS").unwrap_or(SEEDS)
}

const SEEDS: u64 = 30;

#[test]
fn i1_i3_a_disk_error_reaches_its_own_guest_alone_under_faults_of_every_seed() {
    let seeds = seeds();
    let (mut nanos, mut requests) = (0, 0);
    for seed in seeds.clone() {
        match run(seed, Rules::ENFORCED) {
            Ok(ran) => {
                nanos += ran.nanos;
                requests += ran.requests;
            }
            Err(failure) => panic!("seed {seed}: {failure}"),
        }
    }
    let minutes = nanos / 60_000_000_000;
    println!(
        "seeds {seeds:?}: {}.{} simulated hours, {requests} requests",
        minutes / 60,
        minutes % 60 / 6
    );
}

#[test]
fn a_seed_replays_exactly() {
    assert_eq!(run(3, Rules::ENFORCED), run(3, Rules::ENFORCED));
}
