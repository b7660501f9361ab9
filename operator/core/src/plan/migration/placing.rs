//! The beginning of an attempt: refusals, and the reservation on the target.

use std::time::Duration;

use bascule_crds::names::reason;
use bascule_types::Owner;

use super::Planner;
use crate::MigrationPhase;
use crate::action::MigrationUpdate;
use crate::observed::RowView;
use crate::plan::reservation::leaving;
use crate::{Action, Fact, Migration, Moment, NodeView, Pod, Purpose, Stream};

impl Planner<'_> {
    pub(super) fn begin_migration(&mut self, row: &RowView, node: &str, migration: &Migration) {
        if let Some(target) = &migration.target {
            let refusal = match self.observed.nodes.get(target) {
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
                // One that is silent for a moment is waited for once it has been placed.
                Some(view) if silent_for_a_moment(view, self.now) => None,
                Some(_) => self
                    .can_host(target)
                    .err()
                    .map(|why| (reason::NO_TARGET, why)),
            };
            if let Some((reason, message)) = refusal {
                return self.end(migration, MigrationPhase::Failed, reason, message);
            }
        }
        if migration.cancel {
            let message = "given up before it began";
            return self.end(
                migration,
                MigrationPhase::Cancelled,
                reason::CANCELLED,
                message,
            );
        }
        self.push(Action::ReportMigration {
            name: migration.name.clone(),
            update: MigrationUpdate {
                phase: MigrationPhase::Placing,
                source: Some(node.to_owned()),
                target: migration.target.clone(),
                source_epoch: Some(row.epoch),
                reason: reason::PLACING,
                message: "waiting for the scheduler to choose a node".to_owned(),
                progress: None,
            },
        });
    }

    /// The node that takes the guest, once its reservation is bound to one that can.
    pub(super) fn place_migration(
        &mut self,
        row: &RowView,
        node: &str,
        migration: &Migration,
    ) -> Option<(String, Owner)> {
        let purpose = Purpose::Migration(migration.name.clone());
        let pod = self
            .pods()
            .iter()
            .find(|pod| pod.purpose == purpose && !leaving(pod));
        let Some(pod) = pod else {
            let lost = self.pods().iter().any(|pod| pod.purpose == purpose);
            if lost && migration.phase != MigrationPhase::Placing {
                let message = "the target's reservation was taken away";
                self.end(
                    migration,
                    MigrationPhase::Failed,
                    reason::NO_TARGET,
                    message,
                );
                return None;
            }
            let pin = migration.target.clone();
            self.create_reservation(row, purpose, pin, vec![node.to_owned()]);
            return None;
        };
        if self.is_outdated(pod, Some(node)) {
            self.delete_reservation(pod, false);
            return None;
        }
        let target = self.bound_target(node, migration, pod)?;
        match self.can_host(&target) {
            Ok(owner) => Some((target, owner)),
            Err(why) if self.is_waited_for(&target, migration) => {
                self.report_placing(node, migration, Some(target), why);
                None
            }
            Err(why) => {
                self.end(migration, MigrationPhase::Failed, reason::NO_TARGET, why);
                None
            }
        }
    }

    /// Whether a target that cannot take the guest just now is given some time: an attempt that has
    /// got as far as this is not ended because a node is busy or its daemon starts anew.
    fn is_waited_for(&mut self, target: &str, migration: &Migration) -> bool {
        if !self.may_recover(target) {
            return false;
        }
        let lost = self.observed.memory.target_lost;
        let since = lost
            .filter(|(attempt, _)| *attempt == migration.attempt)
            .map_or(self.now, |(_, since)| since);
        self.report.target_lost = Some((migration.attempt, since));
        self.now.since(since) < TARGET_PATIENCE
    }

    fn report_placing(
        &mut self,
        node: &str,
        migration: &Migration,
        target: Option<String>,
        message: String,
    ) {
        self.push(Action::ReportMigration {
            name: migration.name.clone(),
            update: MigrationUpdate {
                phase: MigrationPhase::Placing,
                source: Some(node.to_owned()),
                target,
                source_epoch: migration.source_epoch,
                reason: reason::PLACING,
                message,
                progress: None,
            },
        });
    }

    fn bound_target(&mut self, node: &str, migration: &Migration, pod: &Pod) -> Option<String> {
        if let Some(target) = &pod.node {
            return Some(target.clone());
        }
        let message = match &pod.unschedulable {
            Some(why) => format!("no node has room or fits the placement: {why}"),
            None => "waiting for the scheduler to choose a node".to_owned(),
        };
        self.report_placing(node, migration, migration.target.clone(), message);
        None
    }
}

/// Whether a node or its volume's process does not answer, and may well do so before an attempt's time
/// is up.
fn silent_for_a_moment(node: &NodeView, now: Moment) -> bool {
    match node.stream {
        Stream::Down { since } => now.since(since) < TARGET_PATIENCE,
        Stream::Unknown => true,
        Stream::Up => node.access == Fact::Unknown && node.kvm_error.is_none(),
    }
}

/// As long as a daemon takes to start anew.
const TARGET_PATIENCE: Duration = Duration::from_secs(30);
