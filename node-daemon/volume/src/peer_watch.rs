//! The peer-watch thread: reads the heartbeats and leader blocks of all nodes. Fence proofs,
//! elections and the status are based on what it has read.

use std::io;
use std::time::Duration;

use bascule_types::{SlotId, error_chain};
use bascule_volume_format::{
    BlockStore, CoordinatorEpoch, Follower, HeartbeatRecord, Leaders, UnknownFeatures, read_copies,
    read_leaders, recover,
};
use bascule_volume_protocol::{HeartbeatSeen, WatchEvent};

use crate::block_device::Handle;
use crate::control_blocks;
use crate::volume_context::VolumeContext;

/// Reads once per poll interval until the process stops.
pub fn run(context: &VolumeContext) {
    let mut handle = context.device.handle();
    let mut metadata_due = context.now();
    let mut follower = None;
    loop {
        read_once(context, &mut handle);
        if context.now() >= metadata_due {
            follower = follow(context, &mut handle, follower);
            metadata_due = context.now().after(METADATA_INTERVAL);
        }
        // A notification of the shared state does not shorten the poll interval.
        let next = context.now().after(context.superblock.timings.poll);
        let mut state = context.state();
        loop {
            let left = next.since(context.now());
            if state.stopping {
                return;
            }
            if left.is_zero() {
                break;
            }
            state = context.wait(state, left);
        }
    }
}

/// Reads the heartbeats and leader blocks of all nodes once.
pub fn read_once<S: BlockStore>(context: &VolumeContext, store: &mut S) {
    let slots = slots_in_use(context);
    let issued_at = context.now();
    let seen = read_all(context, store, slots);
    let completed_at = context.now();
    match seen {
        Ok((heartbeats, leaders)) => {
            context.report_damage(&leaders.obsolete);
            context.update(|state| {
                let of = |slot: SlotId| {
                    let record = heartbeats.iter().find(|record| record.owner.slot == slot);
                    (slot, record.map(HeartbeatSeen::from))
                };
                let event = WatchEvent::Read {
                    issued_at,
                    completed_at,
                    slots: (0..slots).map(SlotId).map(of).collect(),
                };
                state.watcher = state.watcher.clone().next(event);
                state.heartbeats = heartbeats.into_iter().map(|r| (r.owner.slot, r)).collect();
                state.leader = leaders.newest();
                state.read_error = None;
            });
        }
        Err(error) => {
            let error = format!("cannot read the volume: {}", error_chain(&error));
            tracing::warn!(error, "no heartbeat was read");
            context.update(|state| state.read_error = Some(error));
            reopen(context);
        }
    }
}

/// How many slots are read: up to the last one that has a holder, or all while the metadata is not
/// known.
fn slots_in_use(context: &VolumeContext) -> u16 {
    let state = context.state();
    let all = context.superblock.slot_count;
    state.overview.as_ref().map_or(all, |(_, overview)| {
        let last = overview.slots.iter().map(|row| row.slot.0).max();
        last.map_or(all, |last| last.saturating_add(1).min(all))
    })
}

fn read_all<S: BlockStore>(
    context: &VolumeContext,
    store: &mut S,
    slots: u16,
) -> io::Result<(Vec<HeartbeatRecord>, Leaders)> {
    context.device.check_present()?;
    let heartbeats = control_blocks::read_heartbeats(store, &context.superblock, slots)?;
    let leaders = read_leaders(store, &context.superblock)?;
    Ok((heartbeats, leaders))
}

/// Re-opens the path after an I/O error, and uses it if it still holds this volume.
fn reopen(context: &VolumeContext) {
    let volume = context.superblock.volume;
    let same = context.device.reopen_if(&mut |mut candidate| {
        read_copies(&mut candidate, context.config.features)
            .is_ok_and(|found| found.current.volume == volume)
    });
    match same {
        Ok(true) => tracing::info!("re-opened the device"),
        Ok(false) => tracing::debug!("the path does not name this volume"),
        Err(error) => tracing::debug!(%error, "cannot re-open the device"),
    }
}

/// Reads what changed of the metadata, for the status. A result that is inconsistent, because the coordinator is
/// writing at the same time, is dropped.
fn follow(
    context: &VolumeContext,
    handle: &mut Handle,
    follower: Option<Follower>,
) -> Option<Follower> {
    let epoch = {
        let state = context.state();
        if state.coordinator.is_some() {
            return None;
        }
        state
            .leader
            .map_or(CoordinatorEpoch(0), |leader| leader.epoch)
    };
    let superblock = &context.superblock;
    let followed = match follower.map(|follower| follower.follow(handle, superblock, epoch)) {
        Some(Ok(Some((follower, false)))) => return Some(follower),
        Some(Ok(Some((follower, true)))) => follower,
        Some(Ok(None) | Err(_)) | None => {
            let recovered = recover(handle, superblock).ok()?;
            context.report_damage(&recovered.obsolete);
            Follower::from(recovered)
        }
    };
    let overview = (followed.epoch(), followed.metadata().overview());
    let unknown = overview.1.features.without(context.config.features);
    if !unknown.is_empty() {
        // The superblock may not name them yet, and a process that took a lease over has not joined anew.
        context.fail(&UnknownFeatures(unknown).to_string());
    }
    context.update(|state| {
        if state.coordinator.is_none() {
            state.overview = Some(overview);
        }
    });
    Some(followed)
}

/// On a node that does not coordinate, the status is at most this old, and a newly registered node
/// is watched after at most this time.
const METADATA_INTERVAL: Duration = Duration::from_secs(2);
