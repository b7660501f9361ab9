//! One attempt to move a running guest.
//!
//! ```text
//! Pending ─► Placing ─► Copying ─► Committing ─► Succeeded
//!    │          │          │            │
//!    └──────────┴──────────┴────────────┴──────► Failed, Cancelled
//!                                (after Committing only when the volume says that it did not happen)
//! ```
//!
//! The commit point is the transfer of the row, which the source asks the volume for. A row in a
//! later epoch than the attempt began in tells that it was committed; until then the guest is the
//! source's, and every failure leaves it running there (I5).

mod placing;

use std::net::SocketAddr;
use std::time::Duration;

use bascule_crds::names::reason;
use bascule_ipc::vm::{self, MigrationLimits, MigrationStatus, VmState};
use bascule_types::Owner;

use super::Planner;
use crate::MigrationPhase;
use crate::action::MigrationUpdate;
use crate::observed::RowView;
use crate::{Action, Migration, MigrationMode, Phase, Process, Purpose};

impl<'a> Planner<'a> {
    /// The migration that is under way, or whose turn it is. Those that come too early are refused.
    pub(super) fn select_migration(&mut self) -> Option<&'a Migration> {
        let mut open: Vec<&'a Migration> = self
            .observed
            .migrations
            .known()
            .map_or(&[][..], Vec::as_slice)
            .iter()
            .filter(|migration| !migration.phase.is_final())
            .collect();
        open.sort_by_key(|m| (m.phase == MigrationPhase::Pending, m.created, &m.name));
        let (active, others) = open.split_first()?;
        for other in others {
            let message = format!("migration {} of the same virtual machine runs", active.name);
            self.end(
                other,
                MigrationPhase::Failed,
                reason::ANOTHER_MIGRATION_RUNS,
                message,
            );
        }
        Some(active)
    }

    /// The guest does not run, so nothing can move.
    pub(super) fn refuse_migrations(&mut self, row: &RowView) {
        let Some(active) = self.select_migration() else {
            return;
        };
        match active.source_epoch {
            None => {
                let message = "the virtual machine is not running";
                self.end(
                    active,
                    MigrationPhase::Failed,
                    reason::VM_NOT_RUNNING,
                    message,
                );
            }
            Some(epoch) if epoch == row.epoch => {
                let message = "the guest ended before it had moved";
                self.end(active, MigrationPhase::Failed, reason::SUPERSEDED, message);
            }
            Some(_) => self.report.migration = Some(active.name.clone()),
        }
    }

    /// The next step of `migration`, whose guest runs on `node`.
    pub(super) fn drive_migration(
        &mut self,
        row: &'a RowView,
        node: &str,
        process: &Process,
        migration: &'a Migration,
    ) {
        self.requeue_soon();
        if migration
            .source_epoch
            .is_some_and(|epoch| epoch < row.epoch)
        {
            // It was committed: finish_committed_migration says the rest.
            return;
        }
        if migration.phase == MigrationPhase::Pending {
            return self.begin_migration(row, node, migration);
        }
        let progress = progress_of(migration, process);
        if let Some(progress) = progress
            && let Some((phase, reason, message)) = outcome(progress)
        {
            self.end_with(migration, phase, reason, message, Some(progress.clone()));
            return;
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
        self.ready(
            Phase::Migrating,
            true,
            reason::MIGRATING,
            format!("leaving {node}"),
        );
        if let Some(progress) = progress {
            return self.report_progress(row, node, migration, progress);
        }
        if let Some(why) = self.rejected(migration) {
            return self.end(migration, MigrationPhase::Failed, reason::FAILED, why);
        }
        let Some((target, to)) = self.place_migration(row, node, migration) else {
            return;
        };
        match migration.mode {
            MigrationMode::Live => self.go_live(row, process, migration, &target, to),
            MigrationMode::Quick if self.has_begun(migration, process) => {}
            MigrationMode::Quick => self.push(Action::MigrateQuick {
                node: node.to_owned(),
                pid: process.status.pid,
                attempt: migration.attempt,
                to,
            }),
        }
    }

    /// Takes the attempt back, unless it has passed its commit request: then only the volume knows.
    pub(super) fn give_up_migration(
        &mut self,
        row: &RowView,
        node: &str,
        process: &Process,
        migration: &Migration,
        why: &'static str,
    ) {
        self.requeue_soon();
        if migration
            .source_epoch
            .is_some_and(|epoch| epoch < row.epoch)
        {
            return;
        }
        let in_flight = progress_of(migration, process).filter(|p| outcome(p).is_none());
        if in_flight.is_some() {
            return self.push(Action::CancelMigration {
                node: node.to_owned(),
                attempt: migration.attempt,
            });
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
            _ => "given up, as asked".to_owned(),
        };
        self.end(migration, phase, why, message);
    }

    /// Why no node took the guest, in the scheduler's words if it had any.
    fn no_target(&self, migration: &Migration) -> String {
        let purpose = Purpose::Migration(migration.name.clone());
        let mut mine = self.pods().iter().filter(|pod| pod.purpose == purpose);
        match mine.find_map(|pod| pod.unschedulable.as_ref()) {
            Some(why) => format!("no node could take the guest in time: {why}"),
            None => "no node could take the guest in time".to_owned(),
        }
    }

    /// A migration in flight whose row has changed hands.
    pub(super) fn finish_committed_migration(&mut self, row: &'a RowView) {
        let Some(active) = self
            .observed
            .migrations
            .known()
            .map_or(&[][..], Vec::as_slice)
            .iter()
            .find(|m| !m.phase.is_final() && m.source_epoch.is_some_and(|e| e < row.epoch))
        else {
            return;
        };
        let super::place::Place::On { node, .. } = self.place(row) else {
            let message = "the guest moved, and ended there";
            return self.end(active, MigrationPhase::Failed, reason::SUPERSEDED, message);
        };
        if active.source.as_ref() == Some(&node) {
            let message = "the guest was started on its old node again";
            return self.end(active, MigrationPhase::Failed, reason::SUPERSEDED, message);
        }
        let there = self.process_of(row, &node).filter(|process| process.alive);
        let runs = there.is_some_and(|process| process.status.state == VmState::Running);
        // The source knows the figures, the last of them a moment after the guest runs; its process
        // stays until it is collected.
        let mut sources = (self.observed.processes.iter())
            .filter(|process| Some(&process.node) == active.source.as_ref());
        let measures = |process: &Process| {
            let progress = progress_of(active, process).map(|progress| progress.phase);
            process.alive && progress == Some(vm::MigrationPhase::Committing)
        };
        let runs = runs && (!sources.clone().any(measures) || self.out_of_time(active));
        let progress = sources
            .find_map(|process| progress_of(active, process))
            .or_else(|| there.and_then(|process| progress_of(active, process)))
            .cloned();
        let (phase, reason, message) = if runs {
            let arrived = format!("{}: the guest runs on {node}", active.name);
            self.event(reason::SUCCEEDED, false, arrived);
            (
                MigrationPhase::Succeeded,
                reason::SUCCEEDED,
                format!("the guest runs on {node}"),
            )
        } else {
            let message = format!("handed over to {node}");
            (MigrationPhase::Committing, reason::IN_PROGRESS, message)
        };
        self.report.migration = (!runs).then(|| active.name.clone());
        self.push(Action::ReportMigration {
            name: active.name.clone(),
            update: MigrationUpdate {
                phase,
                source: active.source.clone(),
                target: Some(node),
                source_epoch: active.source_epoch,
                reason,
                message,
                progress,
            },
        });
        self.requeue_soon();
    }

    /// Whether an incoming process may still become the guest of this tenure.
    pub(super) fn arrival_expected(&self, row: &RowView, process: &Process) -> bool {
        let migrations = self
            .observed
            .migrations
            .known()
            .map_or(&[][..], Vec::as_slice);
        migrations.iter().any(|migration| {
            migration
                .source_epoch
                .is_some_and(|epoch| epoch.next() == row.epoch)
                && !self.out_of_time(migration)
                && (process.status.migration.as_ref())
                    .is_none_or(|status| status.attempt == migration.attempt)
        })
    }

    fn go_live(
        &mut self,
        row: &RowView,
        source: &Process,
        migration: &Migration,
        target: &str,
        to: Owner,
    ) {
        let attempt = migration.attempt;
        let incoming = self.observed.processes.iter().find(|process| {
            process.node == target
                && process.alive
                && process.status.state == VmState::Incoming
                && process.status.epoch == row.epoch
        });
        let told = self
            .observed
            .memory
            .listening
            .filter(|(a, _)| *a == attempt)
            .map(|(_, s)| s);
        let peer = incoming.and_then(|process| told.or_else(|| routable(process)));
        self.push(Action::ReportMigration {
            name: migration.name.clone(),
            update: MigrationUpdate {
                phase: MigrationPhase::Copying,
                source: Some(source.node.clone()),
                target: Some(target.to_owned()),
                source_epoch: migration.source_epoch,
                reason: reason::IN_PROGRESS,
                message: format!("{target} is getting ready"),
                progress: None,
            },
        });
        match peer {
            None => self.push(Action::PrepareIncoming {
                node: target.to_owned(),
                attempt,
                owner: to,
                epoch: row.epoch,
            }),
            Some(_) if self.has_begun(migration, source) => {}
            Some(peer) => {
                let limits = self.limits(migration);
                self.push(Action::MigrateLive {
                    node: source.node.clone(),
                    pid: source.status.pid,
                    attempt,
                    peer,
                    to,
                    limits,
                });
            }
        }
    }

    fn report_progress(
        &mut self,
        row: &RowView,
        node: &str,
        migration: &Migration,
        progress: &MigrationStatus,
    ) {
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
        self.push(Action::ReportMigration {
            name: migration.name.clone(),
            update: MigrationUpdate {
                phase,
                source: Some(node.to_owned()),
                target,
                source_epoch: Some(row.epoch),
                reason: reason::IN_PROGRESS,
                message: message.to_owned(),
                progress: Some(progress.clone()),
            },
        });
    }

    /// Why a node refused to begin, if no report since then says that it had begun already.
    fn rejected(&self, migration: &Migration) -> Option<String> {
        let (attempt, at, why) = self.observed.memory.move_rejected.as_ref()?;
        let settled = self.now.since(*at) >= REFUSAL_SETTLES;
        (*attempt == migration.attempt && settled).then(|| why.clone())
    }

    /// This very process has said that it has begun, and its next report will tell how it goes.
    /// However long that report takes, asking again would only be refused.
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

    fn end(
        &mut self,
        migration: &Migration,
        phase: MigrationPhase,
        reason: &'static str,
        message: impl Into<String>,
    ) {
        self.end_with(migration, phase, reason, message.into(), None);
    }

    fn end_with(
        &mut self,
        migration: &Migration,
        phase: MigrationPhase,
        reason: &'static str,
        message: String,
        progress: Option<MigrationStatus>,
    ) {
        if self.report.migration.as_ref() == Some(&migration.name) {
            self.report.migration = None;
        }
        self.event(
            reason,
            phase == MigrationPhase::Failed,
            format!("{}: {message}", migration.name),
        );
        self.push(Action::ReportMigration {
            name: migration.name.clone(),
            update: MigrationUpdate {
                phase,
                source: migration.source.clone(),
                target: migration.target.clone(),
                source_epoch: migration.source_epoch,
                reason,
                message,
                progress,
            },
        });
        // A destination that was built waits for nothing now.
        for process in &self.observed.processes {
            if process.alive && process.status.state == VmState::Incoming {
                self.actions.push(Action::CollectVm {
                    node: process.node.clone(),
                    pid: process.status.pid,
                });
            }
        }
        self.requeue_soon();
    }
}

/// What the process says of this attempt.
fn progress_of<'p>(migration: &Migration, process: &'p Process) -> Option<&'p MigrationStatus> {
    process
        .status
        .migration
        .as_ref()
        .filter(|status| status.attempt == migration.attempt)
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

/// Reports come every second: by then one has told if the attempt had begun after all.
const REFUSAL_SETTLES: Duration = Duration::from_secs(3);
