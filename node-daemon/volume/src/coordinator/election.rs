//! The coordinator thread: stands for election when there is no live coordinator, and runs a term
//! ([`super::term`]) when it has won.
//!
//! # States
//! ```text
//!   watching ──no live coordinator──► electing ──Won──► term ──deposed, lease lapsed,
//!       ▲                                │                │    I/O failed
//!       └────────────────────────────────┴────────────────┘
//! ```
//! An election is safe at any time. It is held when the coordinator's heartbeat has not changed for
//! the lease time, or when requests of this node have not reached the coordinator for twice the
//! lease time.

use std::io;
use std::time::Duration;

use bascule_types::{BootTime, Owner, error_chain};
use bascule_volume_format::{
    BLOCK_BYTES, BlockStore as _, SlotPart, read_leaders, recover, starting_half,
};
use bascule_volume_protocol::{
    Election, ElectionCommand, ElectionConfig, ElectionEvent, ElectionOutcome, LeasePhase,
    writes_from,
};

use crate::control_blocks;
use crate::coordinator::{Store, term};
use crate::volume_context::{State, VolumeContext};
use crate::write_ledger::{RecordedStore, WriteLedger};

/// Takes part in elections until the process stops.
pub fn run(context: &VolumeContext, ledger: WriteLedger) {
    let superblock = context.superblock.clone();
    let mut store = RecordedStore::new(context.device.handle(), superblock, ledger);
    let mut election: Option<Election> = None;
    // No write of an earlier process is outstanding then that did not fail.
    let settle = context.superblock.timings.settle;
    let rules = context.config.rules;
    let mut not_before = writes_from(rules, store.ledger().quiet_since(), settle);
    while let Some(me) = wait_for_vacancy(context, not_before) {
        let timings = &context.superblock.timings;
        if let Some(reason) = why_unfit(context, &mut store, me) {
            tracing::error!(reason, "this node does not stand for election");
            not_before = context.now().after(timings.watch);
            continue;
        }
        if let Err(error) = blank_own_leader(context, &mut store, me) {
            let error = error_chain(&error);
            tracing::warn!(error, "this node does not stand for election");
            not_before = context.now().after(timings.lease);
            continue;
        }
        let participant = match election.take() {
            Some(election) => election.renamed(me),
            None => {
                let ledger = store.ledger();
                Election::new(config(context, ledger, me), &ledger.barred(me.slot))
            }
        };
        let (participant, outcome) = elect(context, &mut store, participant);
        election = Some(participant);
        tracing::debug!(?outcome, "an election ended");
        let now = context.now();
        if !matches!(outcome, ElectionOutcome::NotBefore(_)) {
            store.settle();
        }
        not_before = match outcome {
            ElectionOutcome::Won(epoch) => {
                term::run(context, &mut store, me, epoch);
                // The new coordinator, or the renewal of the lapsed lease, needs at least one poll.
                context.now().after(timings.poll)
            }
            ElectionOutcome::Elected(..) => now.after(timings.lease),
            ElectionOutcome::Beaten => {
                let most = timings.poll.max(Duration::from_millis(50)) * 2;
                now.after(context.host.random_delay(most))
            }
            ElectionOutcome::NotBefore(moment) => moment,
            ElectionOutcome::Unfit => {
                let reason = "writes of election blocks failed and may still land: this node takes part in no \
                              election before it was restarted";
                tracing::error!(reason);
                now.after(timings.watch)
            }
        };
    }
}

fn config(context: &VolumeContext, ledger: &WriteLedger, me: Owner) -> ElectionConfig {
    ElectionConfig {
        me,
        slots: context.superblock.slot_count,
        quiet_since: ledger.quiet_since(),
        settle: context.superblock.timings.settle,
        rules: context.config.rules,
    }
}

/// Why this node could not begin a term although it were elected: the area that it would write next has
/// a failed write.
fn why_unfit(context: &VolumeContext, store: &mut Store, me: Owner) -> Option<String> {
    let barred = store.ledger().barred(me.slot);
    if !barred.iter().any(|part| matches!(part, SlotPart::Area(_))) {
        return None;
    }
    // Metadata that cannot be read is reported by the term that fails to begin.
    let recovered = recover(store, &context.superblock).ok()?;
    let half = starting_half(recovered.area, me.slot, &barred);
    half.err().map(|error| error.to_string())
}

/// Blanks this slot's leader block if it is damaged and an older one. It has to be done before this node
/// stands: its new Paxos blocks would say that the damaged block may be the newest.
fn blank_own_leader(context: &VolumeContext, store: &mut Store, me: Owner) -> io::Result<()> {
    let superblock = &context.superblock;
    let lba = superblock.leader_lba(me.slot);
    let leaders = read_leaders(store, superblock)?;
    let Some(block) = leaders.obsolete.iter().find(|block| block.lba == lba) else {
        return Ok(());
    };
    tracing::warn!("{block}: blanking it");
    store.write(lba, &[0; BLOCK_BYTES])?;
    store.flush()
}

/// Waits until this node should stand for election; `None` when the process stops.
fn wait_for_vacancy(context: &VolumeContext, not_before: BootTime) -> Option<Owner> {
    loop {
        context.wait_until(context.superblock.timings.poll, |state| state.stopping);
        let now = context.now();
        let state = context.state();
        if state.stopping {
            return None;
        }
        if now >= not_before
            && let Some(me) = vacancy(&state, context, now)
        {
            return Some(me);
        }
    }
}

/// This node's slot and generation if it should stand for election.
fn vacancy(state: &State, context: &VolumeContext, now: BootTime) -> Option<Owner> {
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
    // A leader block of this node's own slot is of an earlier process. A newer generation or a
    // detached record means that the coordinator has gone.
    let gone = leader.slot == me.slot
        || record.is_none_or(|record| record.owner != leader || record.detached);
    let lease = context.superblock.timings.lease;
    let unresponsive = state.watcher.evidence(leader).unchanged_for >= lease;
    let unreachable = state
        .unreachable_since
        .is_some_and(|since| now.since(since) >= lease * 2);
    (gone || unresponsive || unreachable).then_some(me)
}

/// Runs one election to its outcome.
fn elect(
    context: &VolumeContext,
    store: &mut Store,
    election: Election,
) -> (Election, ElectionOutcome) {
    let now = context.now();
    let (mut election, mut command) = election.next(&ElectionEvent::Start { now });
    loop {
        let event = match command {
            Some(ElectionCommand::Done(outcome)) => return (election, outcome),
            Some(command) => perform(context, store, command),
            // The state machine has a command until it is done.
            None => ElectionEvent::Failed,
        };
        (election, command) = election.next(&event);
        if command.is_none() {
            return (election, ElectionOutcome::Beaten);
        }
    }
}

fn perform(context: &VolumeContext, store: &mut Store, command: ElectionCommand) -> ElectionEvent {
    let superblock = &context.superblock;
    let written = match command {
        ElectionCommand::ReadBlocks => {
            let paxos = control_blocks::read_paxos(store, superblock);
            let leaders = read_leaders(store, superblock);
            return match (paxos, leaders) {
                (Ok(paxos), Ok(leaders)) => ElectionEvent::Blocks {
                    paxos,
                    leaders: leaders.blocks,
                },
                _ => ElectionEvent::Failed,
            };
        }
        ElectionCommand::WritePaxos { subsector, block } => {
            let lba = superblock.paxos_lba(block.writer.slot, subsector);
            control_blocks::write_durably(store, superblock, lba, &block)
        }
        ElectionCommand::WriteLeader(leader) => {
            let lba = superblock.leader_lba(leader.coordinator.slot);
            control_blocks::write_durably(store, superblock, lba, &leader)
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
