//! Nodes of different releases: a feature of the format is raised when the last node supports it, and a node whose
//! release lacks it does not come back.

use std::sync::Arc;
use std::time::Duration;

use bascule_types::Owner;
use bascule_volume_format::{Features, read_copies};
use bascule_volume_protocol::{Mutation, Rules};

use crate::profile::Kind;
use crate::scheduler::{Scheduler, nanos};
use crate::world::{NODES, World};
use crate::{Setup, new_world, sound};

const FEATURE: Features = Features::from_bits(1 << 40);

/// Its boot, and with that its generation, begins with this release.
fn boot(world: &Arc<World>, node: u8, features: Features) {
    world.nodes()[usize::from(node)].features = features;
    world.boot(node);
}

fn reboot(world: &Arc<World>, node: u8, features: Features) {
    world.reset(node);
    // Another node coordinates then.
    world.scheduler.sleep(Duration::from_secs(30));
    boot(world, node, features);
}

/// What the node's process has joined as, and the features that it sees.
fn view(world: &World, node: u8) -> (Option<Owner>, Features) {
    let volume = world.nodes()[usize::from(node)].volume.clone();
    let Some(volume) = volume else {
        return (None, Features::NONE);
    };
    let state = volume.state();
    let overview = state.overview.as_ref();
    let features = overview.map(|(_, overview)| overview.features);
    (state.joined, features.unwrap_or_default())
}

/// Waits until this is so on every node.
fn wait(world: &World, what: &str, is_so: impl Fn((Option<Owner>, Features)) -> bool) {
    let deadline = world.scheduler.now() + nanos(PATIENCE);
    while !(0..NODES).all(|node| is_so(view(world, node))) {
        assert!(world.scheduler.now() < deadline, "{what}");
        world.scheduler.sleep(Duration::from_secs(1));
    }
}

/// The error is the first failed check.
fn upgrade(rules: Rules) -> Result<u64, String> {
    let setup = Setup {
        rules,
        ..sound(Kind::Mixed)
    };
    Scheduler::run(1, move |scheduler| {
        let world = new_world(scheduler, setup);
        for node in 0..NODES {
            boot(&world, node, Features::NONE);
        }
        wait(&world, "every node joins", |(joined, _)| joined.is_some());
        for node in 0..LAST {
            reboot(&world, node, FEATURE);
        }
        reboot(&world, LAST, Features::NONE);
        scheduler.sleep(PATIENCE);
        wait(
            &world,
            "raised without the last node",
            |(joined, features)| joined.is_some() && features.is_empty(),
        );
        reboot(&world, LAST, FEATURE);
        wait(&world, "raised with the last node", |(joined, features)| {
            joined.is_some() && features == FEATURE
        });
        let copies = read_copies(&mut world.disk.offline(), FEATURE).expect("a volume");
        assert_eq!((copies.current.features, copies.stale), (FEATURE, None));
        reboot(&world, LAST, Features::NONE);
        scheduler.sleep(PATIENCE);
        let (joined, _) = view(&world, LAST);
        assert_eq!(joined, None, "an earlier release came back");
        reboot(&world, LAST, FEATURE);
        wait(&world, "every node is back", |(joined, features)| {
            joined.is_some() && features == FEATURE
        });
    })
}

#[test]
fn a_feature_is_raised_when_the_last_node_supports_it_and_a_release_without_it_stays_out() {
    assert_eq!(upgrade(Rules::ENFORCED).err(), None);
}

#[test]
fn a_feature_that_is_raised_before_every_node_supports_it_is_found() {
    let found = upgrade(Rules::without(Mutation::RaiseWithoutAsking));
    let error = found.expect_err("it is not found");
    assert!(error.contains("raised without the last node"), "{error}");
}

const LAST: u8 = NODES - 1;
const PATIENCE: Duration = Duration::from_secs(120);
