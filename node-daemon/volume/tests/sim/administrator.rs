//! The administrator who confirms that nodes are dead: those that are off, and, too hastily, one that has
//! just joined again.

use std::sync::Arc;
use std::time::Duration;

use bascule_ipc::volume::{Request, Response};
use bascule_types::{AdminConfirmation, Change, Owner};

use crate::operator::DAEMON;
use crate::scheduler::WORLD;
use crate::world::{NODES, World};

pub(crate) fn start(world: &Arc<World>, end: u64) {
    for node in 0..NODES {
        let world = Arc::clone(world);
        let watch = Arc::clone(&world);
        world.scheduler.spawn(WORLD, "administrator", move || {
            watch_node(&watch, node, end);
        });
    }
}

fn watch_node(world: &Arc<World>, node: u8, end: u64) {
    let mut known = None;
    let mut off_for = 0;
    while world.scheduler.now() < end {
        world.scheduler.sleep(LOOK);
        let (is_up, volume) = {
            let nodes = world.nodes();
            let node = &nodes[usize::from(node)];
            (node.is_up, node.volume.clone())
        };
        off_for = if is_up { 0 } else { off_for + 1 };
        let joined = volume.and_then(|volume| volume.state().joined);
        match joined {
            Some(owner) if known != Some(owner) => {
                known = Some(owner);
                confirm(world, node, owner);
            }
            // Off for longer than anything of it may land.
            None if off_for >= OFF_LOOKS => {
                if let Some(owner) = known {
                    confirm(world, node, owner);
                }
            }
            _ => {}
        }
    }
}

fn confirm(world: &Arc<World>, victim: u8, owner: Owner) {
    let asked = world.some_node();
    let confirmation = AdminConfirmation::Confirmed;
    let change = Change::ConfirmFenced {
        victim: owner,
        confirmation,
    };
    let answer = world.call_volume(asked, DAEMON, &Request::Change(change));
    if !matches!(answer, Some((Response::Granted(_), _))) {
        return;
    }
    let volume = world.nodes()[usize::from(victim)].volume.clone();
    let Some(volume) = volume else { return };
    let now = world.node_time(victim);
    let state = volume.state();
    let lives = state.joined == Some(owner) && state.lease_until(now).is_some();
    assert!(
        !lives,
        "I2: {owner} was confirmed as dead while its lease was valid"
    );
}

/// Between two looks at a node.
const LOOK: Duration = Duration::from_millis(100);
/// Five seconds: longer than the settle time.
const OFF_LOOKS: u32 = 50;
