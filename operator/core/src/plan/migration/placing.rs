//! The beginning of an attempt: refusals, and the reservation on the target.

use std::time::Duration;

use bascule_crds::names::reason;
use bascule_types::Owner;

use super::ending::{report, update_of};
use crate::observed::RowView;
use crate::plan::context::PlanContext;
use crate::plan::reservation::leaving;
use crate::plan::step::{ReportChange, Step};
use crate::{Action, Fact, Migration, MigrationPhase, Moment, NodeView, Pod, Purpose, Stream};

impl PlanContext<'_> {
    pub(super) fn begin_migration(&self, row: &RowView, node: &str, migration: &Migration) -> Step {
        if let Some((reason, message)) = self.refusal(node, migration) {
            return self.end(migration, MigrationPhase::Failed, reason, message);
        }
        if migration.cancel {
            let (phase, reason) = (MigrationPhase::Cancelled, reason::CANCELLED);
            return self.end(migration, phase, reason, "given up before it began");
        }
        let placing = MigrationPhase::Placing;
        let update = update_of(migration, placing, reason::PLACING, SCHEDULING)
            .with_source(Some(node.to_owned()))
            .with_source_epoch(Some(row.epoch));
        Step::action(report(migration, update))
    }

    /// Why a migration to the target in its spec cannot begin.
    fn refusal(&self, node: &str, migration: &Migration) -> Option<(&'static str, String)> {
        let target = migration.target.as_ref()?;
        match self.observed.nodes.get(target) {
            _ if target == node => Some((
                reason::TARGET_IS_SOURCE,
                format!("it runs on {node} already"),
            )),
            None => Some((
                reason::TARGET_UNKNOWN,
                format!("there is no node {target} that runs bascule-node"),
            )),
            Some(view) if view.cordoned => Some((
                reason::TARGET_CORDONED,
                format!("node {target} is cordoned"),
            )),
            // One that does not respond for a moment is waited for once it has been placed.
            Some(view) if briefly_unresponsive(view, self.now) => None,
            Some(_) => self
                .can_host(target)
                .err()
                .map(|why| (reason::NO_TARGET, why)),
        }
    }

    /// The node that takes the guest, once its reservation is bound to one that can.
    pub(super) fn place_migration(
        &self,
        row: &RowView,
        node: &str,
        migration: &Migration,
    ) -> (Step, Option<(String, Owner)>) {
        let pod = match self.reservation_of(row, node, migration) {
            Ok(pod) => pod,
            Err(step) => return (step, None),
        };
        let Some(target) = &pod.node else {
            let message = match &pod.unschedulable {
                Some(why) => format!("no node has room or fits the placement: {why}"),
                None => SCHEDULING.to_owned(),
            };
            let asked_for = migration.target.clone();
            let report = report_placing(node, migration, asked_for, message);
            return (Step::action(report), None);
        };
        let why = match self.can_host(target) {
            Ok(owner) => return (Step::new(), Some((target.clone(), owner))),
            Err(why) => why,
        };
        let mut step = Step::new();
        if self.may_recover(target) {
            let since = self.target_lost_since(migration);
            step.change(ReportChange::TargetLost(migration.attempt, since));
            if self.now.since(since) < TARGET_PATIENCE {
                step.push(report_placing(node, migration, Some(target.clone()), why));
                return (step, None);
            }
        }
        step.append(self.end(migration, MigrationPhase::Failed, reason::NO_TARGET, why));
        (step, None)
    }

    /// The reservation pod of a migration, or what to do as long as there is none.
    fn reservation_of(
        &self,
        row: &RowView,
        node: &str,
        migration: &Migration,
    ) -> Result<&Pod, Step> {
        let purpose = Purpose::Migration(migration.name.clone());
        let mine = || self.pods().iter().filter(|pod| pod.purpose == purpose);
        if let Some(pod) = mine().find(|pod| !leaving(pod)) {
            if self.is_outdated(pod, Some(node)) {
                return Err(self.delete_reservation(pod, false));
            }
            return Ok(pod);
        }
        if mine().next().is_some() && migration.phase != MigrationPhase::Placing {
            let message = "the target's reservation was taken away";
            return Err(self.end(
                migration,
                MigrationPhase::Failed,
                reason::NO_TARGET,
                message,
            ));
        }
        let mut step = Step::new();
        if let Some(refusal) = self.reservation_refusal(&purpose) {
            let message = &refusal.message;
            let update = update_of(migration, MigrationPhase::Placing, refusal.reason, message)
                .with_source(Some(node.to_owned()));
            step.push(report(migration, update));
        }
        let pin = migration.target.clone();
        let avoid = vec![node.to_owned()];
        step.append(self.create_reservation(row, purpose.clone(), pin, avoid));
        Err(step)
    }

    /// Since when the target has been unable to take the guest. An attempt that has got this far is not
    /// ended because a node is busy or its daemon restarts.
    fn target_lost_since(&self, migration: &Migration) -> Moment {
        let lost = self.observed.memory.target_lost;
        lost.filter(|(attempt, _)| *attempt == migration.attempt)
            .map_or(self.now, |(_, since)| since)
    }
}

fn report_placing(
    node: &str,
    migration: &Migration,
    target: Option<String>,
    message: String,
) -> Action {
    let update = update_of(migration, MigrationPhase::Placing, reason::PLACING, message)
        .with_source(Some(node.to_owned()))
        .with_target(target);
    report(migration, update)
}

/// Whether a node or its volume's process does not answer, and may well do so before an attempt's time
/// is up.
fn briefly_unresponsive(node: &NodeView, now: Moment) -> bool {
    match node.stream {
        Stream::Down { since } => now.since(since) < TARGET_PATIENCE,
        Stream::Unknown => true,
        Stream::Up => node.access == Fact::Unknown && node.kvm_error.is_none(),
    }
}

const SCHEDULING: &str = "waiting for the scheduler to choose a node";
/// As long as a daemon takes to restart.
const TARGET_PATIENCE: Duration = Duration::from_secs(30);
