//! The coordinate thread: stands for election when there is no coordinator, and coordinates when
//! it has won.
//!
//! ```text
//!   watching ──no coordinator, or it is silent──► electing ──Won──► leading ──deposed, lease
//!       ▲                                            │                │       lapsed, I/O failed
//!       └────────────────────────────────────────────┴────────────────┘
//! ```
//! An election is safe at any time; it is held when the coordinator's heartbeat has not moved for L
//! or when it cannot be reached for 2 L although somebody asks.

use std::time::Duration;

use bascule_types::{BootTime, Owner};
use bascule_volume_format::CoordinatorEpoch;
use bascule_volume_gate::boot_time_now;
use bascule_volume_protocol::{
    Election, ElectionCommand, ElectionConfig, ElectionEvent, ElectionOutcome, LeasePhase, Rules,
};
use rand::RngExt as _;

use crate::device::Handle;
use crate::lead;
use crate::node::{Node, State};
use crate::records;

/// Takes part until the process stops.
pub fn run(node: &Node) {
    let mut handle = node.device.handle();
    let mut election: Option<Election> = None;
    let mut not_before = BootTime(0);
    while let Some(me) = wait_for_vacancy(node, not_before) {
        let participant = match election.take() {
            Some(election) => election.renamed(me),
            None => Election::new(config(node, me)),
        };
        let (participant, outcome) = elect(node, &mut handle, participant);
        election = Some(participant);
        tracing::debug!(?outcome, "election");
        let now = boot_time_now();
        let timings = &node.superblock.timings;
        not_before = match outcome {
            ElectionOutcome::Won(epoch) => {
                lead::lead(node, &mut handle, me, epoch);
                // Whoever deposed this node, or its own lost lease, needs a moment.
                boot_time_now().after(timings.poll)
            }
            ElectionOutcome::Elected(..) => now.after(timings.lease),
            ElectionOutcome::Beaten => {
                let most = timings.poll.max(Duration::from_millis(50)) * 2;
                now.after(rand::rng().random_range(Duration::ZERO..most))
            }
            ElectionOutcome::NotBefore(moment) => moment,
            ElectionOutcome::Unfit => {
                let reason = "election writes failed on this node; it needs a new process";
                tracing::error!(reason);
                now.after(timings.watch)
            }
        };
    }
}

fn config(node: &Node, me: Owner) -> ElectionConfig {
    ElectionConfig {
        me,
        slots: node.superblock.slot_count,
        // Paxos and leader blocks are written by pwrite: the end of a process waits for them, and
        // the gate page's lock with it. What is left is the boot before.
        quiet_since: BootTime(0),
        settle: node.superblock.timings.settle,
        rules: Rules::ENFORCED,
    }
}

/// Waits until this node should stand; none when the process stops.
fn wait_for_vacancy(node: &Node, not_before: BootTime) -> Option<Owner> {
    loop {
        node.wait_until(node.superblock.timings.poll, |state| state.stopping);
        let now = boot_time_now();
        let state = node.state();
        if state.stopping {
            return None;
        }
        if now >= not_before
            && let Some(me) = vacancy(&state, node, now)
        {
            return Some(me);
        }
    }
}

/// Who this node would be as coordinator, if there is reason to stand.
fn vacancy(state: &State, node: &Node, now: BootTime) -> Option<Owner> {
    let me = state.lease.owner?;
    let fit = state.lease.phase == LeasePhase::Held && now < state.lease.expiry;
    if !fit || state.failed.is_some() || state.read_error.is_some() {
        return None;
    }
    let Some(leader) = state.leader else {
        return Some(me);
    };
    let leader = leader.coordinator;
    let record = state.heartbeats.get(&leader.slot);
    // The own slot's: an earlier life of this process. A newer generation or a last record: it is
    // gone.
    let gone = leader.slot == me.slot
        || record.is_none_or(|record| record.owner != leader || record.detached);
    let lease = node.superblock.timings.lease;
    let silent = state.watcher.evidence(leader).unchanged_for >= lease;
    let unreachable = state
        .unreachable_since
        .is_some_and(|since| now.since(since) >= lease * 2);
    (gone || silent || unreachable).then_some(me)
}

/// Runs one election to its end.
fn elect(node: &Node, handle: &mut Handle, election: Election) -> (Election, ElectionOutcome) {
    let now = boot_time_now();
    let (mut election, mut command) = election.next(&ElectionEvent::Start { now });
    loop {
        let event = match command {
            Some(ElectionCommand::Done(outcome)) => return (election, outcome),
            Some(command) => perform(node, handle, command),
            // The machine always commands something until it is done.
            None => ElectionEvent::Failed,
        };
        (election, command) = election.next(&event);
        if command.is_none() {
            return (election, ElectionOutcome::Beaten);
        }
    }
}

fn perform(node: &Node, handle: &mut Handle, command: ElectionCommand) -> ElectionEvent {
    let superblock = &node.superblock;
    let written = match command {
        ElectionCommand::ReadBlocks => {
            let paxos = records::read_paxos(handle, superblock);
            let leaders = records::read_leaders(handle, superblock);
            return match (paxos, leaders) {
                (Ok(paxos), Ok(leaders)) => ElectionEvent::Blocks { paxos, leaders },
                _ => ElectionEvent::Failed,
            };
        }
        ElectionCommand::WritePaxos { subsector, block } => {
            let lba = superblock.paxos_lba(block.writer.slot, subsector);
            records::write_durably(handle, superblock, lba, &block)
        }
        ElectionCommand::WriteLeader(leader) => {
            let lba = superblock.leader_lba(leader.coordinator.slot);
            records::write_durably(handle, superblock, lba, &leader)
        }
        ElectionCommand::Done(_) => return ElectionEvent::Failed,
    };
    match written {
        Ok(()) => ElectionEvent::Written,
        Err(error) => {
            tracing::warn!(%error, "cannot write an election block");
            ElectionEvent::Failed
        }
    }
}

/// The highest epoch of any leader block, read now.
///
/// # Errors
/// The device's.
pub fn highest_epoch(node: &Node, handle: &mut Handle) -> std::io::Result<CoordinatorEpoch> {
    let leaders = records::read_leaders(handle, &node.superblock)?;
    let highest = leaders.iter().map(|leader| leader.epoch).max();
    Ok(highest.unwrap_or_default())
}
