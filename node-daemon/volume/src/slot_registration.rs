//! The registration thread: registers this node for a slot of the volume, and reports every new
//! generation to the coordinator (rejoin).
//!
//! This is not the enrolment of a node in the cluster, which `bascule-node` does.
//!
//! # States
//! ```text
//!   no slot ──RegisterNode──► slot ──heartbeat thread begins a generation──► Held
//!                               ▲                                             │ Rejoin
//!                               └─────────── lease lapsed ◄── joined ◄────────┘
//! ```
//! Until the coordinator has answered the rejoin, the gate page does not show the new generation:
//! the VMs may have another owner by now.

use std::time::Duration;

use bascule_types::{Answer, Change, Owner};
use bascule_volume_format::{LogError, SlotRow, recover};
use bascule_volume_protocol::LeasePhase;

use crate::block_device::Handle;
use crate::peer_rpc::{PeerOperation, PeerResponse};
use crate::volume_context::{State, VolumeContext};

/// Registers, and rejoins after every lapse of the lease, until the process stops.
pub fn run(context: &VolumeContext) {
    let mut handle = context.device.handle();
    loop {
        let Some(need) = wait_for_need(context) else {
            return;
        };
        let done = match need {
            Need::Slot => get_slot(context, &mut handle),
            Need::Rejoin(owner) => rejoin(context, &mut handle, owner),
        };
        if let Err(reason) = done {
            tracing::info!(reason, "cannot join the volume yet");
            context.update(|state| state.waiting_for = Some(reason));
            context.wait_until(RETRY, |state| state.stopping);
        }
    }
}

enum Need {
    Slot,
    Rejoin(Owner),
}

fn wait_for_need(context: &VolumeContext) -> Option<Need> {
    let need = |state: &State| {
        if state.slot.is_none() {
            return Some(Need::Slot);
        }
        let owner = state.lease.owner?;
        let fresh = state.lease.phase == LeasePhase::Held && state.joined != Some(owner);
        fresh.then_some(Need::Rejoin(owner))
    };
    loop {
        context.wait_until(RETRY, |state| state.stopping || need(state).is_some());
        let state = context.state();
        if state.stopping {
            return None;
        }
        if let Some(need) = need(&state) {
            return Some(need);
        }
    }
}

/// Reads this node's slot from the volume; if it has none, requests one from the coordinator.
fn get_slot(context: &VolumeContext, handle: &mut Handle) -> Result<(), String> {
    if let Some(row) = read_slot_row(context, handle)? {
        context.update(|state| {
            state.slot = Some(row);
            state.waiting_for = Some("the lease".to_owned());
        });
        return Ok(());
    }
    let me = context.config.node;
    let register = PeerOperation::Change(Change::RegisterNode { node: me });
    match context.request_coordinator(&register, REQUEST_TIMEOUT) {
        // The next call reads the slot from the volume.
        Some(PeerResponse::Granted(_)) => Ok(()),
        Some(PeerResponse::Refused(refusal)) => Err(format!("registration was refused: {refusal}")),
        _ => Err("not registered on this volume, and no coordinator answers".to_owned()),
    }
}

fn rejoin(context: &VolumeContext, handle: &mut Handle, owner: Owner) -> Result<(), String> {
    let row =
        read_slot_row(context, handle)?.ok_or("this node's slot is no longer in the metadata")?;
    let change = Change::Rejoin {
        node: context.config.node,
        from: row.owner(),
        rebooted: row.boot != context.config.boot,
    };
    match context.request_coordinator(&PeerOperation::Change(change), REQUEST_TIMEOUT) {
        Some(PeerResponse::Granted(Answer::Slot { owner: now, kept })) if now == owner => {
            tracing::info!(%owner, kept = kept.len(), "joined the volume");
            context.update(|state| {
                state.joined = Some(owner);
                state.slot = Some(SlotRow {
                    generation: owner.generation,
                    boot: context.config.boot,
                    ..row
                });
                state.waiting_for = None;
            });
            Ok(())
        }
        Some(PeerResponse::Granted(_)) => Err("the lease changed meanwhile".to_owned()),
        Some(PeerResponse::Refused(refusal)) => Err(format!("joining was refused: {refusal}")),
        _ => Err("no coordinator answers".to_owned()),
    }
}

/// Reads the slot of this node. Retries when the metadata is inconsistent, because the coordinator
/// may be writing it at the same time.
fn read_slot_row(context: &VolumeContext, handle: &mut Handle) -> Result<Option<SlotRow>, String> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        match recover(handle, &context.superblock) {
            Ok(recovered) => {
                return Ok(recovered.metadata.slot_of(context.config.node).copied());
            }
            Err(LogError::Io { .. }) => return Err("the volume cannot be read".to_owned()),
            Err(error) if attempt == READ_ATTEMPTS => {
                return Err(format!("the metadata is damaged: {error}"));
            }
            Err(_) => {
                context.wait_until(RETRY, |state| state.stopping);
            }
        }
    }
}

/// Between two attempts.
const RETRY: Duration = Duration::from_millis(200);
/// How long one attempt waits for an answer of the coordinator.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// A checkpoint is written within 2 s; inconsistent metadata in this many reads, 200 ms apart, is
/// damage.
const READ_ATTEMPTS: u32 = 10;
