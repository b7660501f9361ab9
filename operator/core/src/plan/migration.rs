//! One attempt to move a running guest.
//!
//! # States
//! ```text
//! Pending ─► Placing ─► Copying ─► Committing ─► Succeeded
//!    │          │          │            │
//!    └──────────┴──────────┴────────────┴──────► Failed, Cancelled
//!                                (after Committing only when the volume says that it did not happen)
//! ```
//!
//! The commit point is the transfer of the row, which the source requests from the volume. A row in a
//! later epoch than the attempt began in tells that it was committed; until then the guest is the
//! source's, and every failure leaves it running there (I5).

mod ending;
mod placing;

use std::net::SocketAddr;
use std::time::Duration;

use bascule_crds::names::reason;
use bascule_ipc::vm::{self, MigrationLimits, MigrationStatus, VmState};
use bascule_types::Owner;

use self::ending::{report, update_of};
use super::context::PlanContext;
use super::place::Place;
use super::step::{Ready, ReportChange, Step};
use crate::observed::RowView;
use crate::{Action, Migration, MigrationMode, MigrationPhase, Phase, Process, Purpose};

impl<'a> PlanContext<'a> {
    /// The migration that is under way, or whose turn it is, and the refusal of all others.
    pub(super) fn select_migration(&self) -> (Option<&'a Migration>, Step) {
        let mut refused = Step::new();
        let mut open: Vec<&'a Migration> = self
            .migrations()
            .iter()
            .filter(|migration| !migration.phase.is_final())
            .collect();
        open.sort_by_key(|m| (m.phase == MigrationPhase::Pending, m.created, &m.name));
        let Some((active, others)) = open.split_first() else {
            return (None, refused);
        };
        for other in others {
            let message = format!("migration {} of the same virtual machine runs", active.name);
            let reason = reason::ANOTHER_MIGRATION_RUNS;
            refused.append(self.end(other, MigrationPhase::Failed, reason, message));
        }
        (Some(active), refused)
    }

    /// Ends migrations of a guest that does not run.
    pub(super) fn refuse_migrations(&self, row: &RowView) -> Step {
        let (active, mut step) = self.select_migration();
        let Some(active) = active else {
            return step;
        };
        let failed = MigrationPhase::Failed;
        match active.source_epoch {
            None => {
                let message = "the virtual machine is not running";
                step.append(self.end(active, failed, reason::VM_NOT_RUNNING, message));
            }
            Some(epoch) if epoch == row.epoch => {
                let message = "the guest ended before it had moved";
                step.append(self.end(active, failed, reason::SUPERSEDED, message));
            }
            Some(_) => step.change(ReportChange::Migration(active.name.clone())),
        }
        step
    }

    /// The next step of `migration`, whose guest runs on `node`.
    pub(super) fn drive_migration(
        &self,
        row: &'a RowView,
        node: &str,
        process: &Process,
        migration: &'a Migration,
    ) -> Step {
        if is_committed(migration, row) {
            // finish_committed_migration reports the rest.
            return Step::new().requeued_soon();
        }
        if migration.phase == MigrationPhase::Pending {
            return self.begin_migration(row, node, migration).requeued_soon();
        }
        let progress = progress_of(migration, process);
        if let Some(progress) = progress
            && let Some((phase, reason, message)) = outcome(progress)
        {
            return self.end_with(migration, phase, reason, message, Some(progress.clone()));
        }
        if migration.cancel {
            return self.give_up_migration(row, node, process, migration, reason::CANCELLED);
        }
        if self.out_of_time(migration) {
            let reason = if progress.is_some() {
                reason::TIMED_OUT
            } else {
                reason::NO_TARGET
            };
            return self.give_up_migration(row, node, process, migration, reason);
        }
        let purpose = Purpose::Migration(migration.name.clone());
        let message = match self.reservation_refusal(&purpose) {
            Some(refusal) => format!("leaving {node}: {}", refusal.message),
            None => format!("leaving {node}"),
        };
        self.carry_on(row, node, process, migration, progress)
            .requeued_soon()
            .with_ready(Ready::new(
                Phase::Migrating,
                true,
                reason::MIGRATING,
                message,
            ))
    }

    /// Neither ended nor out of time: reports its progress, or finds its target and begins to copy.
    fn carry_on(
        &self,
        row: &RowView,
        node: &str,
        process: &Process,
        migration: &Migration,
        progress: Option<&MigrationStatus>,
    ) -> Step {
        if let Some(progress) = progress {
            return Step::action(self.report_progress(row, node, migration, progress));
        }
        if let Some(why) = self.rejected(migration) {
            return self.end(migration, MigrationPhase::Failed, reason::FAILED, why);
        }
        let (mut step, target) = self.place_migration(row, node, migration);
        let Some((target, to)) = target else {
            return step;
        };
        match migration.mode {
            MigrationMode::Live => step.append(self.go_live(row, process, migration, &target, to)),
            MigrationMode::Quick if self.has_begun(migration, process) => {}
            MigrationMode::Quick => step.push(Action::MigrateQuick {
                node: node.to_owned(),
                pid: process.status.pid,
                attempt: migration.attempt,
                to,
            }),
        }
        step
    }

    /// Takes the attempt back, unless it has passed its commit request: then only the volume knows.
    pub(super) fn give_up_migration(
        &self,
        row: &RowView,
        node: &str,
        process: &Process,
        migration: &Migration,
        why: &'static str,
    ) -> Step {
        if is_committed(migration, row) {
            return Step::new().requeued_soon();
        }
        let in_flight = progress_of(migration, process).filter(|p| outcome(p).is_none());
        if in_flight.is_some() {
            return Step::action(Action::CancelMigration {
                node: node.to_owned(),
                attempt: migration.attempt,
            })
            .requeued_soon();
        }
        let phase = if why == reason::CANCELLED {
            MigrationPhase::Cancelled
        } else {
            MigrationPhase::Failed
        };
        let message = match why {
            reason::NO_TARGET => self.no_target(migration),
            reason::TIMED_OUT => "it did not end in time".to_owned(),
            reason::SUPERSEDED => "the virtual machine is being stopped".to_owned(),
            _ => "cancelled on request".to_owned(),
        };
        self.end(migration, phase, why, message)
    }

    /// Why no node took the guest, with the scheduler's message if there is one.
    fn no_target(&self, migration: &Migration) -> String {
        let purpose = Purpose::Migration(migration.name.clone());
        let mut mine = self.pods().iter().filter(|pod| pod.purpose == purpose);
        let refused = self.reservation_refusal(&purpose).map(|r| &r.message);
        match mine.find_map(|pod| pod.unschedulable.as_ref()).or(refused) {
            Some(why) => format!("no node could take the guest in time: {why}"),
            None => "no node could take the guest in time".to_owned(),
        }
    }

    /// Reports a migration in flight whose ownership transfer the volume has committed.
    pub(super) fn finish_committed_migration(&self, row: &'a RowView) -> Step {
        let committed = |m: &&Migration| !m.phase.is_final() && is_committed(m, row);
        let Some(active) = self.migrations().iter().find(committed) else {
            return Step::new();
        };
        let superseded =
            |message| self.end(active, MigrationPhase::Failed, reason::SUPERSEDED, message);
        let Place::On { node, .. } = self.place(row) else {
            return superseded("the guest moved, and ended there");
        };
        if active.source.as_ref() == Some(&node) {
            return superseded("the guest was started on its old node again");
        }
        let there = self.process_of(row, &node).filter(|process| process.alive);
        let runs = there.is_some_and(|process| process.status.state == VmState::Running);
        // The source measures the migration, the last figures a moment after the guest runs; its
        // process stays until it is collected.
        let mut sources = (self.observed.processes.iter())
            .filter(|process| Some(&process.node) == active.source.as_ref());
        let measures = |process: &Process| process.alive && has_more_to_say(active, process);
        let runs = runs && (!sources.clone().any(measures) || self.out_of_time(active));
        let progress = sources
            .find_map(|process| progress_of(active, process))
            .or_else(|| there.and_then(|process| progress_of(active, process)))
            .cloned();
        let mut step = Step::new().requeued_soon();
        let (phase, reason, message) = if runs {
            let message = format!("the guest runs on {node}");
            let arrived = format!("{}: {message}", active.name);
            step.event(reason::SUCCEEDED, false, arrived);
            (MigrationPhase::Succeeded, reason::SUCCEEDED, message)
        } else {
            step.change(ReportChange::Migration(active.name.clone()));
            let message = format!("handed over to {node}");
            (MigrationPhase::Committing, reason::IN_PROGRESS, message)
        };
        let update = update_of(active, phase, reason, message)
            .with_target(Some(node))
            .with_progress(progress);
        step.push(report(active, update));
        step
    }

    /// Whether an incoming process may still become the guest of this epoch.
    pub(super) fn arrival_expected(&self, row: &RowView, process: &Process) -> bool {
        self.migrations().iter().any(|migration| {
            migration
                .source_epoch
                .is_some_and(|epoch| epoch.next() == row.epoch)
                && !self.out_of_time(migration)
                && (process.status.migration.as_ref())
                    .is_none_or(|status| status.attempt == migration.attempt)
        })
    }

    fn go_live(
        &self,
        row: &RowView,
        source: &Process,
        migration: &Migration,
        target: &str,
        to: Owner,
    ) -> Step {
        let attempt = migration.attempt;
        let incoming = self.observed.processes.iter().find(|process| {
            process.node == target
                && process.alive
                && process.status.state == VmState::Incoming
                && process.status.epoch == row.epoch
        });
        let reported = self
            .observed
            .memory
            .listening
            .filter(|(a, _)| *a == attempt)
            .map(|(_, s)| s);
        let peer = incoming.and_then(|process| reported.or_else(|| routable(process)));
        let message = format!("{target} is preparing");
        let update = update_of(
            migration,
            MigrationPhase::Copying,
            reason::IN_PROGRESS,
            message,
        )
        .with_source(Some(source.node.clone()))
        .with_target(Some(target.to_owned()));
        let mut step = Step::action(report(migration, update));
        match peer {
            None => step.push(Action::PrepareIncoming {
                node: target.to_owned(),
                attempt,
                owner: to,
                epoch: row.epoch,
            }),
            Some(_) if self.has_begun(migration, source) => {}
            Some(peer) => {
                let limits = self.limits(migration);
                step.push(Action::MigrateLive {
                    node: source.node.clone(),
                    pid: source.status.pid,
                    attempt,
                    peer,
                    to,
                    limits,
                });
            }
        }
        step
    }

    fn report_progress(
        &self,
        row: &RowView,
        node: &str,
        migration: &Migration,
        progress: &MigrationStatus,
    ) -> Action {
        let purpose = Purpose::Migration(migration.name.clone());
        let target = self
            .pods()
            .iter()
            .find(|pod| pod.purpose == purpose)
            .and_then(|pod| pod.node.clone())
            .or_else(|| migration.target.clone());
        let (phase, message) = match progress.phase {
            vm::MigrationPhase::Committing | vm::MigrationPhase::Completed => {
                (MigrationPhase::Committing, "ownership is being handed over")
            }
            vm::MigrationPhase::Stopping => (MigrationPhase::Copying, "the last pages are sent"),
            _ => (MigrationPhase::Copying, "memory is being copied"),
        };
        let update = update_of(migration, phase, reason::IN_PROGRESS, message)
            .with_source(Some(node.to_owned()))
            .with_target(target)
            .with_source_epoch(Some(row.epoch))
            .with_progress(Some(progress.clone()));
        report(migration, update)
    }

    /// Why a node refused to begin, if no report since then says that it had begun already.
    fn rejected(&self, migration: &Migration) -> Option<String> {
        let (attempt, at, why) = self.observed.memory.move_rejected.as_ref()?;
        let settled = self.now.since(*at) >= REFUSAL_SETTLES;
        (*attempt == migration.attempt && settled).then(|| why.clone())
    }

    /// Whether this process has confirmed the start of the attempt. Its progress comes with its next
    /// report; a second request before that would only be refused.
    fn has_begun(&self, migration: &Migration, source: &Process) -> bool {
        self.observed.memory.move_begun == Some((migration.attempt, source.status.pid))
    }

    fn limits(&self, migration: &Migration) -> MigrationLimits {
        let ms = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let spent = migration
            .started
            .map_or(Duration::ZERO, |at| self.now.since(at));
        MigrationLimits {
            downtime_ms_max: ms(migration.downtime.unwrap_or(self.intent.budgets.downtime)),
            total_ms_max: ms(self.budget(migration).saturating_sub(spent)),
            bytes_per_second_max: migration.bandwidth.or(self.intent.budgets.bandwidth),
        }
    }

    fn budget(&self, migration: &Migration) -> Duration {
        migration.timeout.unwrap_or(match migration.mode {
            MigrationMode::Live => self.intent.budgets.live,
            MigrationMode::Quick => self.intent.budgets.quick,
        })
    }

    fn out_of_time(&self, migration: &Migration) -> bool {
        migration
            .started
            .is_some_and(|at| self.now.since(at) >= self.budget(migration))
    }
}

/// Whether the volume has transferred the ownership since the attempt began.
fn is_committed(migration: &Migration, row: &RowView) -> bool {
    migration
        .source_epoch
        .is_some_and(|epoch| epoch < row.epoch)
}

/// What the process reports of this attempt.
fn progress_of<'p>(migration: &Migration, process: &'p Process) -> Option<&'p MigrationStatus> {
    process
        .status
        .migration
        .as_ref()
        .filter(|status| status.attempt == migration.attempt)
}

/// Whether a later report of the source will have the figures of this attempt, which the volume has committed: the
/// operator may have asked the volume since the last report, which may be older than the attempt.
fn has_more_to_say(migration: &Migration, source: &Process) -> bool {
    match progress_of(migration, source) {
        Some(progress) => {
            progress.phase != vm::MigrationPhase::Completed && outcome(progress).is_none()
        }
        None => !matches!(source.status.state, VmState::Departed | VmState::Stopped(_)),
    }
}

/// How an attempt ended at its source, if it ended without a commit.
fn outcome(progress: &MigrationStatus) -> Option<(MigrationPhase, &'static str, String)> {
    let why = |default: &str| {
        progress
            .failure
            .clone()
            .unwrap_or_else(|| default.to_owned())
    };
    match progress.phase {
        vm::MigrationPhase::Cancelled => Some((
            MigrationPhase::Cancelled,
            reason::CANCELLED,
            why("cancelled"),
        )),
        vm::MigrationPhase::Failed => Some((
            MigrationPhase::Failed,
            reason::FAILED,
            why("the stream broke"),
        )),
        vm::MigrationPhase::NotConverging => Some((
            MigrationPhase::Failed,
            reason::NOT_CONVERGING,
            why("the guest changes its memory faster than it can be copied within the limits"),
        )),
        _ => None,
    }
}

fn routable(process: &Process) -> Option<SocketAddr> {
    process
        .status
        .listening
        .filter(|address| !address.ip().is_unspecified())
}

/// Reports come every second: within this time one shows whether the attempt began after all.
const REFUSAL_SETTLES: Duration = Duration::from_secs(3);
