//! Group commit: requests that wait for the coordinator at the same time share its writes and flushes.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bascule_ipc::volume::{Request, Response};
use bascule_types::{Change, RowName, VmUid};

use crate::operator::DAEMON;
use crate::profile::Kind;
use crate::scheduler::Scheduler;
use crate::world::{World, daemon_of};
use crate::{new_world, sound};

/// Several groups of the largest size.
const REQUESTS: u8 = 200;

fn create(n: u8) -> Request {
    Request::Change(Change::CreateVm {
        vm: VmUid::from_bytes([n; 16]),
        name: RowName::new(format!("shop/vm-{n}")).expect("a name"),
        spec_digest: [n; 32],
    })
}

fn is_granted(world: &Arc<World>, n: u8) -> bool {
    let answer = world.call_volume(0, DAEMON, &create(n));
    matches!(answer, Some((Response::Granted(_), _)))
}

/// One node, which coordinates.
fn coordinator(scheduler: &Arc<Scheduler>) -> Arc<World> {
    let world = new_world(scheduler, sound(Kind::Mixed));
    world.boot(0);
    while !is_granted(&world, 0) {
        scheduler.sleep(Duration::from_secs(1));
    }
    world
}

fn commits(world: &World) -> u64 {
    world.disk.commits.load(Ordering::Relaxed)
}

/// The flushes of metadata that requests cost, sent one after another or all at once.
fn flushes(at_once: bool) -> u64 {
    let result = Arc::new(Mutex::new(0));
    let found = Arc::clone(&result);
    let run = Scheduler::run(1, move |scheduler| {
        let world = coordinator(scheduler);
        let before = commits(&world);
        let granted = Arc::new(AtomicU8::new(0));
        for n in 1..=REQUESTS {
            if !at_once {
                assert!(is_granted(&world, n));
                granted.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let (world, granted) = (Arc::clone(&world), Arc::clone(&granted));
            scheduler.spawn(daemon_of(0), "client", move || {
                assert!(is_granted(&world, n));
                granted.fetch_add(1, Ordering::Relaxed);
            });
        }
        while granted.load(Ordering::Relaxed) < REQUESTS {
            scheduler.sleep(Duration::from_millis(10));
        }
        *found.lock().expect("the result") = commits(&world) - before;
    });
    assert_eq!(run.err(), None);
    let flushes = *result.lock().expect("the result");
    println!("{REQUESTS} requests, at once: {at_once}: {flushes} flushes of metadata");
    flushes
}

#[test]
fn requests_that_wait_together_share_a_flush() {
    let (alone, together) = (flushes(false), flushes(true));
    assert!(alone >= u64::from(REQUESTS), "{alone}");
    // Of at most 59 requests each, and the first group begins when the first request is there.
    assert!(together <= 8, "{together}");
}
