//! The real drivers of three nodes (every thread of `bascule-volume`, its local API and coordinator; the start,
//! loop and answers of `bascule-watchdog`) on a simulated clock, scheduler, disk, network and watchdog device,
//! with faults of a profile drawn from a seed.
//!
//! Checked while it runs: no write of an earlier epoch or of a second process takes effect after one of a
//! later (I1), a watchdog resets its node within the time that a takeover waits for (I1), and no node that has nothing
//! in flight, rows have one owner in each epoch (I2), no acknowledged guest write, change or saved memory
//! is lost (I3), election blocks do not go back (I6). Checked at its end: with the faults gone every VM
//! writes again within a bound (no wedge), and the offline check finds no damage (I6).
//!
//! `make soak SEEDS=1000` runs more seeds, in `JOBS=2` processes side by side, and says how many hours they
//! simulated; `BASCULE_SIM_SEED=7` runs one of them, with figures, and `BASCULE_SIM_PROFILE=Elections` those
//! of one profile. With `RUST_LOG=debug` the drivers' own messages are shown.
//!
//! # Not simulated
//! The VM process but for its disk engine and gate, which are the real ones, with one request at a time (several, of any
//! alignment, are in `node-daemon/devices/tests/sim`); bascule-node and the operator; a device that loses completed
//! writes.

mod administrator;
mod disk;
mod faults;
mod features;
mod group_commit;
mod guest;
mod guest_disk;
mod mutations;
mod operator;
mod oracles;
mod profile;
mod scheduler;
mod watchdog;
mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bascule_types::{ClusterId, VolumeId};
use bascule_volume_format::{
    Fencing, FencingPolicy, FormatRequest, Severity, Timings, check_volume, make_volume,
};
use bascule_volume_protocol::Rules;

use crate::disk::Disk;
use crate::operator::{Operator, VMS};
use crate::profile::{KINDS, Kind};
use crate::scheduler::{Scheduler, WORLD, nanos};
use crate::world::{NODES, World, node_uid};

/// What a run does, and what it breaks on purpose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) profile: Kind,
    pub(crate) rules: Rules,
    /// Of the guests' disk engines.
    pub(crate) disk_rules: bascule_devices::disk::Rules,
    /// A dead writer's lock is said to be free while its requests are in flight (hole 3).
    pub(crate) lock_lies: bool,
    /// Watchdogs never fire.
    pub(crate) no_watchdog: bool,
    /// The timeout that `bascule-watchdog` sets; the product's is 8.
    pub(crate) watchdog_seconds: u64,
    /// A damaged block is an error, whatever proves that it is obsolete (hole 8).
    pub(crate) old_damage_counts: bool,
    /// The newest blocks are damaged too, and a damaged one counts as one that is not there.
    pub(crate) damages_newest: bool,
}

const fn sound(profile: Kind) -> Setup {
    Setup {
        profile,
        rules: Rules::ENFORCED,
        disk_rules: bascule_devices::disk::Rules::ENFORCED,
        lock_lies: false,
        no_watchdog: false,
        watchdog_seconds: 8,
        old_damage_counts: false,
        damages_newest: false,
    }
}

/// A digest of what happened; the error is the first failed check.
fn run(seed: u64, setup: Setup) -> Result<u64, String> {
    if std::env::var_os("RUST_LOG").is_some() {
        let _already = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .without_time()
            .with_thread_names(true)
            .try_init();
    }
    Scheduler::run(seed, move |scheduler| simulate(scheduler, setup))
}

/// The nodes, all of them off, and a volume that is formatted for node 0.
fn new_world(scheduler: &Arc<Scheduler>, setup: Setup) -> Arc<World> {
    let profile = setup.profile.profile(scheduler);
    let request = FormatRequest {
        volume: VolumeId::from_bytes([9; 16]),
        cluster: ClusterId::from_bytes([8; 16]),
        fencing: Fencing::Watchdog,
        policy: FencingPolicy::default(),
        timings: Timings::DEFAULT,
        slot_count: 4,
        extent_mib: 1,
        // The smallest areas have room for few rows.
        device_bytes: if profile.wishes.fills_table { 64 } else { 256 } << 20,
    };
    let superblock = request.lay_out().expect("a layout");
    let disk = Disk::new(scheduler, superblock, setup, &profile);
    make_volume(&mut disk.offline(), &request, Some(node_uid(0))).expect("a volume");
    World::new(scheduler, disk, setup, profile)
}

fn simulate(scheduler: &Arc<Scheduler>, setup: Setup) {
    let world = new_world(scheduler, setup);
    let wishes = world.faults.profile.wishes;
    for node in 0..NODES {
        world.boot(node);
    }
    let mut operator = Operator::new(&world);
    watch_devices(&world);
    operator.set_up();
    let end = world.make_faults();
    if wishes.confirms {
        administrator::start(&world, end);
    }
    while scheduler.now() < end {
        operator.step();
        note(&world);
        scheduler.sleep(wishes.look);
    }
    everyone_writes_again(&world, &mut operator);
    let report = check_volume(&mut world.disk.offline()).expect("the check");
    let damage = report.worst() == Some(Severity::Error);
    assert!(!damage, "I6: {:?}", report.findings);
    SIMULATED_SECONDS.fetch_add(scheduler.now() / 1_000_000_000, Ordering::Relaxed);
    if std::env::var_os("BASCULE_SIM_SEED").is_some() {
        let resets: u32 = world.nodes().iter().map(|node| node.resets).sum();
        let oracle = world.oracle();
        let hours = scheduler.now() / 3_600_000_000;
        println!(
            "{}: {hours} thousandths of an hour, {:?} writes by {} processes, {resets} resets by a watchdog",
            world.faults.profile.name, oracle.writes, oracle.processes
        );
    }
}

/// The devices of the nodes' watchdogs.
fn watch_devices(world: &Arc<World>) {
    let devices = Arc::clone(world);
    world.scheduler.spawn(WORLD, "devices", move || {
        loop {
            devices.scheduler.sleep(Duration::from_millis(250));
            if devices.setup.no_watchdog {
                continue;
            }
            devices.note_idle();
            for node in devices.fired() {
                devices.assert_reset_needed(node);
                devices.assert_reset_in_time(node);
                devices.nodes()[usize::from(node)].resets += 1;
                devices.power_cycle(node);
            }
        }
    });
}

fn note(world: &World) {
    let writes: u64 = world.oracle().writes.values().sum();
    world.scheduler.note(writes);
}

/// No wedge: with all faults gone, every VM writes within a bound. A VM with a failed write stays where it is
/// until its node was restarted, as the documentation says: so every node is restarted once, but for one
/// that the profile may keep off.
fn everyone_writes_again(world: &Arc<World>, operator: &mut Operator) {
    let off = (world.faults.profile.one_stays_off).then(|| world.some_node());
    for node in 0..NODES {
        if world.nodes()[usize::from(node)].is_up {
            world.reset(node);
        }
        world.nodes()[usize::from(node)].stays_off = off == Some(node);
        world.scheduler.sleep(Duration::from_secs(1));
        if off != Some(node) && !world.nodes()[usize::from(node)].is_up {
            world.boot(node);
        }
    }
    let before = world.oracle().writes.clone();
    let deadline = world.scheduler.now() + nanos(BACK_WITHIN);
    operator.takes_over_at_once();
    loop {
        operator.step();
        note(world);
        let now = world.oracle().writes.clone();
        let wrote = |n: &u8| now.get(&u64::from(*n)) > before.get(&u64::from(*n));
        if (0..VMS).all(|n| wrote(&n)) {
            return;
        }
        assert!(
            world.scheduler.now() < deadline,
            "wedged: {BACK_WITHIN:?} after the last fault, the writes are {now:?}, and were {before:?}; {}",
            world.describe()
        );
        world.scheduler.sleep(Duration::from_secs(1));
    }
}

/// T_safe, an election, the operator's steps, and room.
const BACK_WITHIN: Duration = Duration::from_secs(180);

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn seeds() -> std::ops::Range<u64> {
    match number("BASCULE_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => {
            let from = number("BASCULE_SIM_FROM").unwrap_or(0);
            from..from + number("BASCULE_SIM_SEEDS").unwrap_or(SEEDS)
        }
    }
}

/// The profile of a seed: every second one is drawn, the others take turns.
fn profile_of(seed: u64) -> Kind {
    if let Ok(name) = std::env::var("BASCULE_SIM_PROFILE") {
        let named = KINDS.into_iter().find(|kind| format!("{kind:?}") == name);
        return named.expect("a profile of this name");
    }
    let turn = usize::try_from(seed / 2).unwrap_or(0) % KINDS.len();
    if seed.is_multiple_of(2) {
        KINDS[turn]
    } else {
        Kind::Swarm
    }
}

/// Of all runs up to their ends.
static SIMULATED_SECONDS: AtomicU64 = AtomicU64::new(0);

/// Each profile once.
const SEEDS: u64 = 2 * KINDS.len() as u64;

#[test]
fn i1_i3_i6_the_real_drivers_keep_them_under_faults_of_every_seed() {
    let seeds = seeds();
    for seed in seeds.clone() {
        let profile = profile_of(seed);
        if let Err(failure) = run(seed, sound(profile)) {
            panic!("seed {seed}, profile {profile:?}: {failure}");
        }
    }
    let minutes = SIMULATED_SECONDS.load(Ordering::Relaxed) / 60;
    println!(
        "seeds {seeds:?}: {}.{} simulated hours",
        minutes / 60,
        minutes % 60 / 6
    );
}

#[test]
fn a_seed_replays_exactly() {
    assert_eq!(run(3, sound(Kind::Swarm)), run(3, sound(Kind::Swarm)));
}
