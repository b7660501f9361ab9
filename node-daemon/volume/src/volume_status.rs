//! The status of the volume on this node, as `bascule-ipc` defines it. Does no I/O and never waits.

use bascule_ipc::volume::{FencingMode, PathState, PeerStatus, VolumeStatus, WatchdogKind};
use bascule_types::{BootTime, Bytes, Epoch};
use bascule_volume_format::{Fencing, SlotRow, WatchdogKind as FormatKind};

use crate::volume_context::{State, VolumeContext};

/// The volume's state, as this node sees it now.
#[must_use]
pub fn status(context: &VolumeContext) -> VolumeStatus {
    let now = context.now();
    let state = context.state();
    let reason = reason(&state, now);
    let broken = state.failed.is_some() || state.read_error.is_some();
    let path = if state.is_open(now) && !broken {
        PathState::Direct
    } else if broken || state.write_error.is_some() {
        PathState::Unavailable
    } else {
        PathState::Paused
    };
    let superblock = &context.superblock;
    let overview = state.overview.as_ref().map(|(_, overview)| overview);
    let capacity = overview.map_or(Bytes(0), |overview| overview.capacity);
    let free = overview.map_or(Bytes(0), |overview| overview.free);
    let lease_left = state.lease.expiry.since(now).as_millis();
    VolumeStatus {
        volume: superblock.volume,
        cluster: superblock.cluster,
        path,
        reason: reason.filter(|_| path != PathState::Direct),
        owner: state.joined.filter(|_| state.joined == state.lease.owner),
        lease_left_ms: u64::try_from(lease_left).unwrap_or(u64::MAX),
        coordinator: state.leader.map(|leader| leader.coordinator.slot),
        coordinator_epoch: Epoch(state.leader.map_or(0, |leader| leader.epoch.0)),
        peers: peers(&state, now),
        capacity,
        allocated: Bytes(capacity.0.saturating_sub(free.0)),
        fencing: match superblock.fencing {
            Fencing::LeaseOnly => FencingMode::LeaseOnly,
            Fencing::Watchdog | Fencing::PersistentReservation => FencingMode::Watchdog,
        },
        safe_time_ms: u64::try_from(superblock.timings.safe_time().as_millis()).unwrap_or(u64::MAX),
        watchdog: match state.enlistment.kind() {
            FormatKind::Hardware => WatchdogKind::Hardware,
            FormatKind::Software => WatchdogKind::Soft,
            FormatKind::None => WatchdogKind::None,
        },
    }
}

/// Why this node may not write to the volume, for status messages; `None` if it may.
#[must_use]
pub fn reason(state: &State, now: BootTime) -> Option<String> {
    let device = state.failed.clone().or_else(|| state.read_error.clone());
    let device = device.or_else(|| state.write_error.clone());
    if device.is_some() || state.is_open(now) {
        return device;
    }
    let lease = match state.lease_until(now) {
        Some(_) => "the watchdog to watch this volume",
        None => "a new lease",
    };
    let waiting = state.waiting_for.as_deref().unwrap_or(lease);
    Some(format!("this node may not write: waiting for {waiting}"))
}

fn peers(state: &State, now: BootTime) -> Vec<PeerStatus> {
    let Some((_, overview)) = &state.overview else {
        return Vec::new();
    };
    let peer = |row: &SlotRow| {
        let owner = row.owner();
        let record = state.heartbeats.get(&row.slot);
        let unchanged = state.watcher.evidence(owner).unchanged_for.as_millis();
        PeerStatus {
            owner,
            node: row.node,
            alive: state.watcher.may_hold_lease(owner, now),
            no_heartbeat_ms: u64::try_from(unchanged).unwrap_or(u64::MAX),
            address: record.and_then(|record| record.address.parse().ok()),
            fenced: overview.fenced.contains(&owner),
        }
    };
    overview.slots.iter().map(peer).collect()
}
