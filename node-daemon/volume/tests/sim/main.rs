//! The real drivers of three nodes (every thread of `bascule-volume`, its local API and coordinator) on a
//! simulated clock, scheduler, disk, network and watchdog, with faults drawn from a seed.
//!
//! Checked while it runs: no write of an earlier epoch or process takes effect after one of a later (I1),
//! no acknowledged guest write is lost (I3). Checked at its end: with the faults gone every VM writes
//! again within a bound (no wedge), and the offline check finds no damage (I6).
//!
//! `make soak SEEDS=1000` runs more seeds, `BASCULE_SIM_SEED=7` one of them, with figures.
//!
//! # Not simulated
//! The VM process and bascule-watchdog (their gate check, writer page and decisions are the real ones, what
//! drives them is not), bascule-node and the operator; a device that loses completed writes.

mod disk;
mod guest;
mod operator;
mod scheduler;
mod world;

use std::sync::Arc;
use std::time::Duration;

use bascule_types::{ClusterId, VolumeId};
use bascule_volume_format::{
    Fencing, FencingPolicy, FormatRequest, Severity, Timings, check_volume, make_volume,
};
use bascule_volume_protocol::{Mutation, Rules};

use crate::disk::Disk;
use crate::operator::{Operator, VMS};
use crate::scheduler::{Scheduler, WORLD, nanos};
use crate::world::{NODES, World, node_uid};

/// What a run breaks on purpose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) rules: Rules,
    /// A dead writer's lock is said to be free while its requests are in flight (hole 3).
    pub(crate) lock_lies: bool,
    /// Watchdogs never fire.
    pub(crate) no_watchdog: bool,
}

const SOUND: Setup = Setup {
    rules: Rules::ENFORCED,
    lock_lies: false,
    no_watchdog: false,
};

/// A digest of what happened; the error is the first failed check.
fn run(seed: u64, setup: Setup) -> Result<u64, String> {
    Scheduler::run(seed, move |scheduler| simulate(scheduler, setup))
}

fn simulate(scheduler: &Arc<Scheduler>, setup: Setup) {
    let timings = Timings::DEFAULT;
    let disk = Disk::new(scheduler, timings.settle, setup.lock_lies);
    let request = FormatRequest {
        volume: VolumeId::from_bytes([9; 16]),
        cluster: ClusterId::from_bytes([8; 16]),
        fencing: Fencing::Watchdog,
        policy: FencingPolicy::default(),
        timings,
        slot_count: 4,
        extent_mib: 1,
        device_bytes: 256 << 20,
    };
    make_volume(&mut disk.offline(), &request, Some(node_uid(0))).expect("a volume");
    let world = World::new(scheduler, disk, setup);
    for node in 0..NODES {
        world.boot(node);
    }
    let mut operator = Operator::new(&world);
    watch_devices(&world);
    operator.set_up();
    let end = scheduler.now() + nanos(FAULTS_LAST);
    make_faults(&world, end);
    while scheduler.now() < end {
        operator.step();
        note(&world);
        scheduler.sleep(Duration::from_secs(1));
    }
    everyone_writes_again(&world, &mut operator);
    let report = check_volume(&mut world.disk.offline()).expect("the check");
    let damage = report.worst() == Some(Severity::Error);
    assert!(!damage, "I6: {:?}", report.findings);
    if std::env::var_os("BASCULE_SIM_SEED").is_some() {
        let resets: u32 = world.nodes().iter().map(|node| node.resets).sum();
        let oracle = world.oracle();
        let hours = scheduler.now() / 3_600_000_000;
        println!(
            "{hours} thousandths of an hour, {:?} writes by {} processes, {resets} resets by a watchdog",
            oracle.writes, oracle.processes
        );
    }
}

/// The devices of the nodes' watchdogs, and the power buttons of those that are down.
fn watch_devices(world: &Arc<World>) {
    let devices = Arc::clone(world);
    world.scheduler.spawn(WORLD, "devices", move || {
        loop {
            devices.scheduler.sleep(Duration::from_millis(250));
            if devices.setup.no_watchdog {
                continue;
            }
            for node in devices.fired() {
                devices.nodes()[usize::from(node)].resets += 1;
                power_cycle(&devices, node);
            }
        }
    });
}

/// The node is off at once, and on again later.
fn power_cycle(world: &Arc<World>, node: u8) {
    world.reset(node);
    let off = Duration::from_millis(2000 + world.scheduler.below(40_000));
    let later = Arc::clone(world);
    world.scheduler.spawn(WORLD, "power", move || {
        later.scheduler.sleep(off);
        let is_down = !later.nodes()[usize::from(node)].is_up;
        if is_down {
            later.boot(node);
        }
    });
}

fn make_faults(world: &Arc<World>, end: u64) {
    let faults = Arc::clone(world);
    world.scheduler.spawn(WORLD, "faults", move || {
        loop {
            let pause = Duration::from_millis(faults.scheduler.below(12_000));
            faults.scheduler.sleep(pause);
            if faults.scheduler.now() >= end {
                return;
            }
            make_fault(&faults, end);
        }
    });
}

fn make_fault(world: &Arc<World>, end: u64) {
    let scheduler = &world.scheduler;
    let node = u8::try_from(scheduler.below(u64::from(NODES))).unwrap_or(0);
    let is_up = world.nodes()[usize::from(node)].is_up;
    let until = |most_ms: u64| (scheduler.now() + scheduler.below(most_ms * 1_000_000)).min(end);
    match scheduler.below(8) {
        _ if !is_up => {}
        0 => {
            let pid = world.nodes()[usize::from(node)].volume_pid;
            if let Some(pid) = pid {
                world.kill_process(node, pid);
            }
        }
        1 | 2 => {
            // A guest, also while its path is stalled: its writes are under way then.
            if scheduler.once_in(2) {
                world.disk.stall(node, until(45_000));
                let pause = Duration::from_millis(scheduler.below(3000));
                scheduler.sleep(pause);
            }
            for pid in world.guests_of(node) {
                world.kill_process(node, pid);
            }
        }
        3 => power_cycle(world, node),
        4 => scheduler.freeze(node, until(60_000)),
        5 => world.disk.stall(node, until(60_000)),
        6 => world.disk.fail_writes(node, until(10_000)),
        _ => world.nodes()[usize::from(node)].cut_off_until = until(30_000),
    }
}

fn note(world: &World) {
    let writes: u64 = world.oracle().writes.values().sum();
    world.scheduler.note(writes);
}

/// No wedge: with all faults gone, every VM writes within a bound. A VM with a failed write stays where it is
/// until its node was restarted, as the documentation says: so every node is restarted once.
fn everyone_writes_again(world: &Arc<World>, operator: &mut Operator) {
    for node in 0..NODES {
        if world.nodes()[usize::from(node)].is_up {
            world.reset(node);
        }
        world.scheduler.sleep(Duration::from_secs(1));
        if !world.nodes()[usize::from(node)].is_up {
            world.boot(node);
        }
    }
    let before = world.oracle().writes.clone();
    let deadline = world.scheduler.now() + nanos(BACK_WITHIN);
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

/// How long faults are made in one run.
const FAULTS_LAST: Duration = Duration::from_secs(240);
/// T_safe, an election, the operator's steps, and room.
const BACK_WITHIN: Duration = Duration::from_secs(180);

fn seeds() -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok()?.parse().ok();
    match number("BASCULE_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("BASCULE_SIM_SEEDS").unwrap_or(SEEDS),
    }
}

/// As many as take some seconds.
const SEEDS: u64 = 8;
/// They need up to 7; a change of the drivers changes which.
const MUTATION_SEEDS: u64 = 40;

#[test]
fn i1_i3_i6_the_real_drivers_keep_them_under_faults_of_every_seed() {
    for seed in seeds() {
        if let Err(failure) = run(seed, SOUND) {
            panic!("seed {seed}: {failure}");
        }
    }
}

#[test]
fn a_seed_replays_exactly() {
    assert_eq!(run(3, SOUND), run(3, SOUND));
}

/// Each of these mutations of a rule or of the machine is found by one of the first seeds. Fifteen
/// seeds found none of the other rules' mutations: those are left to the models.
#[test]
fn broken_rules_are_found() {
    let broken = |mutation| Setup {
        rules: Rules::without(mutation),
        ..SOUND
    };
    for (name, setup) in [
        (
            "a lock says that a dead writer has nothing in flight",
            Setup {
                lock_lies: true,
                ..SOUND
            },
        ),
        (
            "no watchdog fires",
            Setup {
                no_watchdog: true,
                ..SOUND
            },
        ),
        ("PetWithoutLease", broken(Mutation::PetWithoutLease)),
        ("WithdrawBeforeDrain", broken(Mutation::WithdrawBeforeDrain)),
        (
            "WithdrawLapsedInFlight",
            broken(Mutation::WithdrawLapsedInFlight),
        ),
        (
            "TakeOverWithoutFence",
            broken(Mutation::TakeOverWithoutFence),
        ),
        ("AnswerWithoutReread", broken(Mutation::AnswerWithoutReread)),
    ] {
        let found = (0..MUTATION_SEEDS).find(|seed| run(*seed, setup).is_err());
        println!("{name}: found by seed {found:?}");
        assert!(found.is_some(), "{name} is not found");
    }
}
