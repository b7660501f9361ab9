//! The end of an attempt that did not commit, and the updates of its status.

use bascule_ipc::vm::{MigrationStatus, VmState};

use crate::action::MigrationUpdate;
use crate::plan::context::PlanContext;
use crate::plan::step::{ReportChange, Step};
use crate::{Action, Migration, MigrationPhase};

impl PlanContext<'_> {
    pub(super) fn end(
        &self,
        migration: &Migration,
        phase: MigrationPhase,
        reason: &'static str,
        message: impl Into<String>,
    ) -> Step {
        self.end_with(migration, phase, reason, message.into(), None)
    }

    pub(super) fn end_with(
        &self,
        migration: &Migration,
        phase: MigrationPhase,
        reason: &'static str,
        message: String,
        progress: Option<MigrationStatus>,
    ) -> Step {
        let mut step = Step::new().requeued_soon();
        step.change(ReportChange::MigrationEnded(migration.name.clone()));
        step.event(
            reason,
            phase == MigrationPhase::Failed,
            format!("{}: {message}", migration.name),
        );
        let update = update_of(migration, phase, reason, message).with_progress(progress);
        step.push(report(migration, update));
        // The destination that was built for it, if any, is of no use now.
        for process in &self.observed.processes {
            if process.alive && process.status.state == VmState::Incoming {
                step.push(Action::CollectVm {
                    node: process.node.clone(),
                    pid: process.status.pid,
                });
            }
        }
        step
    }
}

/// An update that keeps the nodes and the epoch that the status has.
pub(super) fn update_of(
    migration: &Migration,
    phase: MigrationPhase,
    reason: &'static str,
    message: impl Into<String>,
) -> MigrationUpdate {
    MigrationUpdate::new(phase, reason, message)
        .with_source(migration.source.clone())
        .with_target(migration.target.clone())
        .with_source_epoch(migration.source_epoch)
}

pub(super) fn report(migration: &Migration, update: MigrationUpdate) -> Action {
    Action::ReportMigration {
        name: migration.name.clone(),
        update,
    }
}
