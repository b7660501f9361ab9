//! The watch thread: reads everybody's heartbeats and leader blocks, and keeps the picture that
//! fence proofs, elections and the status are made from.

use std::io;

use bascule_types::SlotId;
use bascule_volume_format::{HeartbeatRecord, LeaderBlock, read_superblock, recover};
use bascule_volume_gate::boot_time_now;
use bascule_volume_protocol::{HeartbeatSeen, WatchEvent};

use crate::device::Handle;
use crate::node::Node;
use crate::records;

/// Watches until the process stops.
pub fn run(node: &Node) {
    let mut handle = node.device.handle();
    let mut round: u64 = 0;
    loop {
        watch(node, &mut handle);
        if round.is_multiple_of(ROWS_EVERY) {
            read_rows(node, &mut handle);
        }
        round += 1;
        // The poll interval is kept whatever else changes: a notification does not shorten it.
        let next = boot_time_now().after(node.superblock.timings.poll);
        let mut state = node.state();
        loop {
            let left = next.since(boot_time_now());
            if state.stopping {
                return;
            }
            if left.is_zero() {
                break;
            }
            state = node.wait(state, left);
        }
    }
}

/// Reads everybody's heartbeats and leader blocks once.
pub fn watch(node: &Node, handle: &mut Handle) {
    let issued_at = boot_time_now();
    let seen = read_all(node, handle);
    let completed_at = boot_time_now();
    match seen {
        Ok((heartbeats, leaders)) => node.update(|state| {
            let of = |slot: SlotId| {
                let record = heartbeats.iter().find(|record| record.owner.slot == slot);
                (slot, record.map(HeartbeatSeen::from))
            };
            let event = WatchEvent::Read {
                issued_at,
                completed_at,
                slots: node.superblock.slots().map(of).collect(),
            };
            state.watcher = state.watcher.clone().next(event);
            state.heartbeats = heartbeats.into_iter().map(|r| (r.owner.slot, r)).collect();
            state.leader = leaders.into_iter().max_by_key(|leader| leader.epoch);
            state.read_error = None;
        }),
        Err(error) => {
            let error = format!("cannot read the volume: {error}");
            tracing::warn!(error, "watch");
            node.update(|state| state.read_error = Some(error));
            reopen(node);
        }
    }
}

fn read_all(
    node: &Node,
    handle: &mut Handle,
) -> io::Result<(Vec<HeartbeatRecord>, Vec<LeaderBlock>)> {
    node.device.check_present()?;
    let heartbeats = records::read_heartbeats(handle, &node.superblock)?;
    let leaders = records::read_leaders(handle, &node.superblock)?;
    Ok((heartbeats, leaders))
}

/// The device may be back, under the same path: only if it is still this volume.
fn reopen(node: &Node) {
    let volume = node.superblock.volume;
    let same = node.device.reopen_if(|candidate| {
        read_superblock(&mut candidate.handle()).is_ok_and(|found| found.volume == volume)
    });
    match same {
        Ok(true) => tracing::info!("re-opened the device"),
        Ok(false) => tracing::debug!("the path does not name this volume"),
        Err(error) => tracing::debug!(%error, "cannot re-open the device"),
    }
}

/// The rows as they lie on the volume, for the status. The coordinator may be writing them at this
/// moment: a picture that contradicts itself is dropped.
fn read_rows(node: &Node, handle: &mut Handle) {
    if node.state().coordinator.is_some() {
        return;
    }
    let found = recover(handle, &node.superblock);
    if let Ok(recovered) = found {
        node.update(|state| {
            if state.coordinator.is_none() {
                state.metadata = Some((recovered.base.epoch, recovered.metadata));
            }
        });
    }
}

/// Rows are read every fourth poll: nothing but the status depends on them.
const ROWS_EVERY: u64 = 4;
