//! The heartbeat thread: renews the heartbeat of this node by the rules of
//! [`bascule_volume_protocol::LeaseHolder`] and publishes the lease in the gate page.
//!
//! The thread does its I/O itself, one step at a time. When a write hangs, the thread hangs: the
//! expiry in the gate page then passes, and every writer stops without being notified.

use std::io;

use bascule_types::{BootTime, Generation, Owner};
use bascule_volume_format::HeartbeatRecord;
use bascule_volume_protocol::{
    Held, JoinClaim, LeaseCommand, LeaseConfig, LeaseEvent, LeaseHolder, LeasePhase, OwnRecord,
    OwnSlot, StopReason, join_claim,
};

use crate::block_device::Handle;
use crate::control_blocks;
use crate::published_watchdog::PublishedWatchdog;
use crate::volume_context::{LeaseView, VolumeContext};

/// The state of the thread.
struct Renewal<'a> {
    context: &'a VolumeContext,
    handle: Handle,
    holder: Option<LeaseHolder>,
}

/// Renews until the process stops. `held` is the lease that an earlier process of this boot left in
/// the gate page, `sequence_sent` the highest sequence number in that page.
pub fn run(context: &VolumeContext, held: Option<Held>, sequence_sent: u64) {
    let mut renewal = Renewal {
        context,
        handle: context.device.handle(),
        holder: None,
    };
    // The state machine needs at least four ticks per renewal interval.
    let tick = context.superblock.timings.renewal / 5;
    loop {
        renewal.start_holder(held, sequence_sent);
        renewal.tick();
        let state = context.state();
        if state.stopping && (!state.leaving || renewal.has_left()) {
            return;
        }
        drop(context.wait(state, tick));
    }
}

impl Renewal<'_> {
    /// Starts the state machine once the slot is known: it needs the highest sequence number there.
    fn start_holder(&mut self, held: Option<Held>, sequence_sent: u64) {
        if self.holder.is_some() {
            return;
        }
        let Some(slot) = self.context.state().slot else {
            return;
        };
        let found =
            control_blocks::read_slot(&mut self.handle, &self.context.superblock, slot.slot);
        let Some(records) = self.note(found, "read this node's heartbeat records") else {
            return;
        };
        let on_disk = records.iter().map(|record| record.sequence).max();
        let config = LeaseConfig {
            node: self.context.config.node,
            timings: self.context.superblock.timings,
            rules: self.context.config.rules,
        };
        let held = held.filter(|held| held.owner.slot == slot.slot);
        let sequence = sequence_sent.max(on_disk.unwrap_or(0));
        let holder = LeaseHolder::start(config, self.context.now(), held, sequence);
        self.holder = Some(holder);
    }

    fn tick(&mut self) {
        let Some(holder) = &self.holder else { return };
        let now = self.context.now();
        let (leaving, stopping) = {
            let state = self.context.state();
            (state.leaving, state.stopping)
        };
        let event = match holder.phase() {
            LeasePhase::Lapsed if !stopping => match self.new_generation(now) {
                Some(owner) => LeaseEvent::NewGeneration { now, owner },
                None => LeaseEvent::Tick { now },
            },
            _ if leaving => LeaseEvent::Leave { now },
            _ => LeaseEvent::Tick { now },
        };
        self.step(event);
    }

    /// Feeds the state machine and performs its commands until it has none.
    fn step(&mut self, event: LeaseEvent) {
        let mut next = Some(event);
        while let Some(event) = next {
            let Some(holder) = self.holder.take() else {
                return;
            };
            let (holder, command) = holder.next(event);
            self.holder = Some(holder);
            next = command.map(|command| self.perform(command));
        }
        self.publish();
    }

    fn perform(&mut self, command: LeaseCommand) -> LeaseEvent {
        match command {
            LeaseCommand::ReadOwnRecords => self.read_own_records(),
            LeaseCommand::WriteRecord {
                owner,
                sequence,
                detached,
            } => {
                let done = self.write_record(owner, sequence, detached);
                let written = self.note(done, "write the heartbeat").is_some();
                let now = self.context.now();
                if written {
                    LeaseEvent::Written { now, sequence }
                } else {
                    LeaseEvent::WriteFailed { now, sequence }
                }
            }
        }
    }

    fn read_own_records(&mut self) -> LeaseEvent {
        let slot = self.holder.as_ref().and_then(LeaseHolder::owner);
        let slot = slot.map(|owner| owner.slot).unwrap_or_default();
        let found = control_blocks::read_slot(&mut self.handle, &self.context.superblock, slot);
        let now = self.context.now();
        match self.note(found, "read this node's heartbeat records") {
            Some(records) => LeaseEvent::OwnRecords {
                now,
                records: records.iter().map(own_record).collect(),
            },
            None => LeaseEvent::ReadFailed { now },
        }
    }

    fn write_record(&mut self, owner: Owner, sequence: u64, detached: bool) -> io::Result<()> {
        // One lock for what the record says and that it is about to be submitted.
        let watchdog = self.context.update(|state| {
            let kind = state.enlistment.kind();
            state.published_watchdog = state.published_watchdog.submitted(kind);
            kind
        });
        let record = HeartbeatRecord {
            node: self.context.config.node,
            boot: self.context.config.boot,
            owner,
            sequence,
            watchdog,
            detached,
            timings: self.context.superblock.timings,
            features: self.context.config.features,
            address: self.context.config.address.to_string(),
        };
        let superblock = &self.context.superblock;
        let lba = superblock.heartbeat_lba(owner.slot, record.block_of_slot());
        // R3 across restarts: the number is recorded as used before the write is submitted.
        self.context.gate.record_sequence_sent(sequence);
        control_blocks::write_durably(&mut self.handle, superblock, lba, &record)?;
        self.context
            .update(|state| state.published_watchdog = PublishedWatchdog::durable(watchdog));
        // A gate may have waited for it.
        self.context.change_enlistment(|enlistment| enlistment);
        Ok(())
    }

    /// The next generation of this node's slot; `None` until the writes of its last boot have
    /// settled.
    fn new_generation(&mut self, now: BootTime) -> Option<Owner> {
        let row = self.context.state().slot?;
        let found = control_blocks::read_slot(&mut self.handle, &self.context.superblock, row.slot);
        let records = self.note(found, "read this node's heartbeat records")?;
        let newest = records.iter().max_by_key(|record| record.order());
        let own = newest.map(|record| OwnSlot {
            node: record.node,
            owner: record.owner,
            boot: record.boot,
        });
        let settle = self.context.superblock.timings.settle;
        let (node, boot) = (self.context.config.node, self.context.config.boot);
        if let JoinClaim::Wait { .. } =
            join_claim(self.context.config.rules, now, boot, node, own, settle)
        {
            let reason =
                "the settle time: writes of this node's last boot may still land".to_owned();
            self.context
                .update(|state| state.waiting_for = Some(reason));
            return None;
        }
        let shown = self.context.gate.view().owner;
        let shown = shown.filter(|owner| owner.slot == row.slot);
        let generation = newest
            .map(|record| record.owner.generation)
            .max(shown.map(|owner| owner.generation))
            .unwrap_or(Generation(0))
            .max(row.generation)
            .next();
        let slot = row.slot;
        tracing::info!(%slot, %generation, "beginning a new generation");
        Some(Owner { slot, generation })
    }

    /// Publishes the lease in the shared state, and in the gate page if the coordinator has
    /// acknowledged its generation and the watchdog watches the volume.
    fn publish(&mut self) {
        let Some(holder) = &self.holder else { return };
        let lease = holder.lease();
        let view = LeaseView {
            phase: holder.phase(),
            owner: holder.owner(),
            expiry: lease.map(|held| held.expiry).unwrap_or_default(),
        };
        let before = self.context.state().lease.phase;
        if before != view.phase {
            tracing::info!(phase = ?view.phase, owner = ?view.owner, "the lease changed its phase");
        }
        if let Err(error) = self.context.set_lease(view) {
            self.context
                .fail(&format!("cannot publish the lease: {error}"));
        }
        if let LeasePhase::Stopped(reason) = view.phase
            && before != view.phase
            && reason != StopReason::Left
        {
            self.context.fail(&reason.to_string());
        }
    }

    fn has_left(&self) -> bool {
        let phase = self.holder.as_ref().map(LeaseHolder::phase);
        // Without a lease no detached record is needed.
        !matches!(phase, Some(LeasePhase::Held | LeasePhase::Begun))
    }

    /// Stores the result of an I/O step for the status, and returns the value on success.
    fn note<T>(&self, result: io::Result<T>, what: &str) -> Option<T> {
        let error = result
            .as_ref()
            .err()
            .map(|error| format!("cannot {what}: {error}"));
        if let Some(error) = &error {
            tracing::warn!(error, "the heartbeat was not renewed");
        }
        if self.context.state().write_error != error {
            self.context.update(|state| state.write_error = error);
        }
        result.ok()
    }
}

fn own_record(record: &HeartbeatRecord) -> OwnRecord {
    OwnRecord {
        node: record.node,
        owner: record.owner,
        sequence: record.sequence,
    }
}
