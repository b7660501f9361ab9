//! One term of the coordinator: from the won election until this node is deposed, its lease lapses
//! or its I/O fails.
//!
//! # Ordering
//! The leader block is durable before the metadata is read; a checkpoint of this epoch is durable
//! before the first request is taken; a group is durable before the leader blocks are read again;
//! and the answers are sent only if they still show this epoch.
//!
//! # Group commit
//! All requests that wait are decided in turn, each on the rows as the ones before it leave them, and their
//! records become durable as one group: one write, one flush and one read of the leader blocks, however many
//! requests there are. While they take their time, the next requests queue. No answer is sent, and no
//! overview is published, before the whole group is in force.

use std::collections::BTreeMap;
use std::time::Duration;

use bascule_ipc::volume::{Rows, VmRows};
use bascule_types::{
    BootTime, Change, DiskId, Epoch, FenceProof, MissingProof, Owner, Refusal, SlotId, VmUid,
    error_chain,
};
use bascule_volume_format::{
    Context, Contradiction, CoordinatorEpoch, DECISION_MAX, Decision, Features, GROUP_MAX,
    LeaderBlock, Log, LogError, MetaRecord, Metadata, Overview, Recovered, Requester, RewriteError,
    SlotRow, Superblock, UnknownFeatures, Witness, recover, rewrite_superblock,
};
use bascule_volume_protocol::fence::{self, FencePolicy};
use bascule_volume_protocol::{
    Coordinator, CoordinatorCommand, CoordinatorEvent, LeasePhase, Ticket, WatchEvent, Watcher,
};

use crate::control_blocks::read_highest_epoch;
use crate::coordinator::Store;
use crate::job_queue::JobQueue;
use crate::peer_rpc::{PeerOperation, PeerRequest, PeerResponse};
use crate::peer_watch;
use crate::volume_context::VolumeContext;

/// The state of one term.
struct Term<'a> {
    context: &'a VolumeContext,
    store: &'a mut Store,
    me: Owner,
    log: Log,
    /// The rows with every decision applied, also those of the group that is not durable yet. Nothing but
    /// further decisions may be taken from it before the group is in force.
    metadata: Metadata,
    rule: Option<Coordinator>,
    tickets: u64,
    /// The features that the superblock names.
    announced: Features,
}

/// Serves requests in `epoch` until the term ends.
pub fn run(context: &VolumeContext, store: &mut Store, me: Owner, epoch: CoordinatorEpoch) {
    let started = start(context, store, me, epoch);
    let (log, metadata) = match started {
        Ok(started) => started,
        Err(error) => {
            report(context, &error);
            return;
        }
    };
    let queue = JobQueue::default();
    let overview = metadata.overview();
    let mut term = Term {
        context,
        store,
        me,
        log,
        metadata,
        rule: Some(Coordinator::new(epoch, context.config.rules)),
        tickets: 0,
        announced: context.superblock.features,
    };
    term.announce_slots(&overview);
    context.update(|state| {
        state.coordinator = Some((epoch, queue.clone()));
        state.leader = Some(LeaderBlock {
            epoch,
            coordinator: me,
        });
        state.overview = Some((epoch, overview));
    });
    tracing::info!(%epoch, "this node coordinates");
    term.serve(&queue);
    context.update(|state| {
        state.coordinator = None;
        queue.close();
    });
    tracing::info!(%epoch, "this node no longer coordinates");
}

fn start(
    context: &VolumeContext,
    store: &mut Store,
    me: Owner,
    epoch: CoordinatorEpoch,
) -> Result<(Log, Metadata), LogError> {
    let recovered: Recovered = recover(store, &context.superblock)?;
    context.report_damage(&recovered.obsolete);
    tracing::info!(base = ?recovered.base, journaled = recovered.journaled, "recovered the metadata");
    if recovered.base.epoch >= epoch {
        // The checkpoint is of a later epoch: another coordinator was elected meanwhile.
        return Err(LogError::Failed);
    }
    let unknown = recovered
        .metadata
        .features()
        .without(context.config.features);
    if !unknown.is_empty() {
        return Err(LogError::Unknown(UnknownFeatures(unknown)));
    }
    let barred = store.ledger().barred(me.slot);
    let term = (me.slot, epoch);
    let log = Log::start(store, &context.superblock, &recovered, term, &barred)?;
    Ok((log, recovered.metadata))
}

/// A failed metadata write or flush closes the gate permanently; damaged metadata only ends the
/// term.
fn report(context: &VolumeContext, error: &LogError) {
    let text = error_chain(error);
    let fatal = match error {
        LogError::Io { what, .. } => *what != READ,
        LogError::Contradiction(_) => true,
        _ => false,
    };
    if fatal {
        context.fail(&text);
    } else {
        tracing::error!(error = text, "cannot coordinate");
    }
}

impl Term<'_> {
    fn serve(&mut self, jobs: &JobQueue) {
        let look_again = self.context.superblock.timings.poll / 2;
        while self.may_go_on() {
            self.raise_features();
            self.announce_features();
            if jobs.is_empty() {
                self.context.wait_until(look_again, |_| !jobs.is_empty());
                continue;
            }
            self.answer_waiting(jobs);
        }
    }

    /// Whether the shared state allows the term to continue. An optimisation: safety rests on the
    /// re-read of the leader blocks before each answer.
    fn may_go_on(&self) -> bool {
        let state = self.context.state();
        let mine = state.lease.phase == LeasePhase::Held
            && state.lease.owner == Some(self.me)
            && self.context.now() < state.lease.expiry;
        let newer = state
            .leader
            .is_some_and(|leader| leader.epoch > self.log.epoch());
        mine && !newer
            && !state.stopping
            && state.failed.is_none()
            && self.rule.as_ref().is_some_and(Coordinator::is_active)
    }

    /// Answers the requests that wait, as many as one group has room for, and then writes the checkpoint that
    /// may be due. A job that is dropped without an answer has an unknown outcome.
    fn answer_waiting(&mut self, jobs: &JobQueue) {
        let mut group = Vec::new();
        let mut answered = Vec::new();
        while group.len() + DECISION_MAX <= GROUP_MAX
            && answered.len() < REQUESTS_MAX
            && let Some(job) = jobs.pop()
        {
            match self.respond(&job.request, &mut group) {
                Ok(response) => answered.push((job, response)),
                Err(error) => return self.end(&LogError::from(error)),
            }
        }
        if !self.commit(&group) {
            return;
        }
        for (job, response) in answered {
            job.answer(response);
        }
        self.context.announce();
        self.checkpoint();
    }

    /// Makes a group durable whose records are applied, and publishes it. Whether it is in force then.
    fn commit(&mut self, group: &[MetaRecord]) -> bool {
        if let Err(error) = self.log.commit(self.store, group) {
            self.end(&error);
            return false;
        }
        let is_in_force = self.is_in_force();
        if is_in_force {
            self.publish(group);
        }
        is_in_force
    }

    fn checkpoint(&mut self) {
        if let Err(error) = self.log.checkpoint_if_due(self.store, &self.metadata) {
            self.end(&error);
        }
    }

    /// Raises the features that every joined node supports by now.
    fn raise_features(&mut self) {
        let config = &self.context.config;
        if config.features.without(self.metadata.features()).is_empty() {
            return;
        }
        let view = FenceView::of(self.context);
        let raised = (self.metadata).raise_features(config.features, &view, config.rules);
        let Some(record) = raised else {
            return;
        };
        if let Err(error) = self.metadata.apply(&record) {
            return self.end(&LogError::from(error));
        }
        if self.commit(&[record]) {
            let features = self.metadata.features();
            tracing::info!(%features, "every node supports these features of the volume: they are in use now");
            self.checkpoint();
        }
    }

    /// Adds what is raised to the superblock. Also what an earlier coordinator has raised, which may have crashed before
    /// it came to this.
    fn announce_features(&mut self) {
        let features = self.metadata.features();
        let is_in_force = self.rule.as_ref().is_some_and(Coordinator::is_active);
        if features == self.announced || !is_in_force {
            return;
        }
        let next = Superblock {
            features,
            revision: superblock_revision(self.log.epoch(), features),
            ..self.context.superblock.clone()
        };
        match rewrite_superblock(self.store, &next, self.context.config.features) {
            Ok(()) => self.announced = features,
            Err(RewriteError::Io(source)) => {
                let what = "write the superblock";
                self.end(&LogError::Io { what, source });
            }
            // A later coordinator has rewritten it, or it cannot be read: the next term tries again.
            Err(error) => {
                let error = error_chain(&error);
                tracing::warn!(
                    error,
                    "the superblock does not name the volume's features yet"
                );
                self.announced = features;
            }
        }
    }

    /// The response to send once `group`, to which the request's records are added, is in force.
    fn respond(
        &mut self,
        request: &PeerRequest,
        group: &mut Vec<MetaRecord>,
    ) -> Result<PeerResponse, Contradiction> {
        let change = match &request.operation {
            PeerOperation::Rows => return Ok(PeerResponse::Rows(self.rows())),
            PeerOperation::Vm(vm) => return Ok(PeerResponse::Vm(self.rows_of(*vm))),
            PeerOperation::Change(change) => change,
        };
        Ok(match self.decide(change, request) {
            Ok(decision) => {
                for record in &decision.records {
                    self.metadata.apply(record)?;
                }
                group.extend(decision.records);
                PeerResponse::Granted(decision.answer)
            }
            Err(refusal) => PeerResponse::Refused(refusal),
        })
    }

    fn end(&mut self, error: &LogError) {
        self.next(CoordinatorEvent::JournalFailed);
        report(self.context, error);
    }

    fn publish(&self, group: &[MetaRecord]) {
        if group.is_empty() {
            return;
        }
        let overview = self.metadata.overview();
        let is_of_slot =
            |record: &MetaRecord| matches!(record, MetaRecord::Slot(_) | MetaRecord::Rejoin { .. });
        if group.iter().any(is_of_slot) {
            self.announce_slots(&overview);
        }
        let epoch = self.log.epoch();
        self.context
            .update(|state| state.overview = Some((epoch, overview)));
    }

    fn decide(&mut self, change: &Change, request: &PeerRequest) -> Result<Decision, Refusal> {
        match self.decide_on_current_evidence(change, request) {
            // The heartbeat may be newer than the last poll.
            Err(Refusal::LeaseInvalid { .. } | Refusal::FeaturesMissing { .. }) => {
                peer_watch::read_once(self.context, self.store);
                self.decide_on_current_evidence(change, request)
            }
            decided => decided,
        }
    }

    fn decide_on_current_evidence(
        &self,
        change: &Change,
        request: &PeerRequest,
    ) -> Result<Decision, Refusal> {
        let view = FenceView::of(self.context);
        let context = Context {
            requester: Requester {
                node: request.node,
                owner: request.owner,
                boot: request.boot,
            },
            witness: &view,
            fresh_disk: DiskId::random(),
            rules: self.context.config.rules,
        };
        self.metadata.decide(change, &context)
    }

    /// Whether the changes up to now are in force: when they became durable, no later coordinator had
    /// a durable leader block.
    fn is_in_force(&mut self) -> bool {
        self.tickets += 1;
        let mine = Ticket(self.tickets);
        let mut commands = self.next(CoordinatorEvent::Durable(mine));
        loop {
            let event = match commands.as_slice() {
                [CoordinatorCommand::ReadLeader] => {
                    match read_highest_epoch(self.store, &self.context.superblock) {
                        Ok(highest) => CoordinatorEvent::Leader { highest },
                        Err(error) => {
                            tracing::warn!(%error, "cannot re-read the leader blocks");
                            CoordinatorEvent::JournalFailed
                        }
                    }
                }
                [CoordinatorCommand::Answer(tickets)] => return tickets.contains(&mine),
                _ => return false,
            };
            commands = self.next(event);
        }
    }

    fn next(&mut self, event: CoordinatorEvent) -> Vec<CoordinatorCommand> {
        let Some(rule) = self.rule.take() else {
            return Vec::new();
        };
        let (rule, commands) = rule.next(event);
        self.rule = Some(rule);
        commands
    }

    fn rows(&self) -> Rows {
        Rows {
            coordinator_epoch: Epoch(self.log.epoch().0),
            vms: self.metadata.vms().cloned().collect(),
            disks: self.metadata.disks().cloned().collect(),
            saved: self.metadata.saved_states().cloned().collect(),
            fences: self.metadata.fences().copied().collect(),
        }
    }

    fn rows_of(&self, vm: VmUid) -> Option<VmRows> {
        Some(VmRows {
            row: self.metadata.vm(vm)?.clone(),
            disks: self.metadata.disks_of(vm).cloned().collect(),
            saved: self.metadata.saved(vm).cloned(),
        })
    }

    /// Reports the generation of every slot to the watcher: a granted generation counts as a
    /// heartbeat at this time.
    fn announce_slots(&self, overview: &Overview) {
        let now = self.context.now();
        self.context.update(|state| {
            for owner in overview.slots.iter().map(SlotRow::owner) {
                let event = WatchEvent::Granted { now, owner };
                state.watcher = state.watcher.clone().next(event);
            }
        });
    }
}

/// The evidence about other nodes at one moment.
struct FenceView {
    watcher: Watcher,
    /// Of the newest record of each slot: who wrote it, and its features.
    records: BTreeMap<SlotId, (Owner, Features)>,
    now: BootTime,
    policy: FencePolicy,
    /// The volume's watch time W.
    watch: Duration,
}

impl FenceView {
    fn of(context: &VolumeContext) -> Self {
        let state = context.state();
        let records = state.heartbeats.iter();
        let records = records.map(|(slot, record)| (*slot, (record.owner, record.features)));
        let records = records.collect();
        let watcher = state.watcher.clone();
        drop(state);
        Self {
            watcher,
            records,
            now: context.now(),
            watch: context.superblock.timings.watch,
            policy: FencePolicy {
                mode: context.superblock.fencing,
                allowed: context.superblock.policy,
                rules: context.config.rules,
            },
        }
    }
}

impl Witness for FenceView {
    fn lease_valid(&self, owner: Owner) -> bool {
        self.watcher.is_alive(owner, self.now)
    }

    fn lease_over(&self, victim: Owner) -> Result<(), MissingProof> {
        self.watcher.check_lease_over(victim, self.watch, self.now)
    }

    fn proof(&self, victim: Owner) -> Result<FenceProof, MissingProof> {
        fence::verify(self.policy, &self.watcher.evidence(victim))
    }

    fn newest_record(&self, slot: SlotId) -> Option<(Owner, Features)> {
        self.records.get(&slot).copied()
    }
}

/// The revision of the superblock that a coordinator of `epoch` writes. It names the writer and the contents: within an
/// epoch features are only added, and a later epoch counts more than a late write of an earlier one.
fn superblock_revision(epoch: CoordinatorEpoch, features: Features) -> u64 {
    let count = u64::from(features.bits().count_ones());
    epoch
        .0
        .saturating_mul(REVISIONS_PER_EPOCH)
        .saturating_add(count)
}

/// More than there are features.
const REVISIONS_PER_EPOCH: u64 = 128;
/// Requests of one group, also such as need no record: bounds the time until the first is answered.
const REQUESTS_MAX: usize = 64;
/// The `what` of a [`LogError::Io`] whose read failed: no write was lost.
const READ: &str = "read metadata";
