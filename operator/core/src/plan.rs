//! What to do next for one virtual machine.
//!
//! # States
//! ```text
//!            row unknown ──► wait                       (nothing is torn down for lack of knowledge)
//!            row absent  ──► create it
//!            row unowned ──► reservation ─► bound ─► Acquire         [lifecycle, reservation]
//!  row owned by node N:
//!     N healthy  ──► imports ─► StartVm                              [lifecycle, import]
//!                    guest runs ─► drain ─► migration, or shutdown   [running, drain, migration,
//!                                                                     shutdown]
//!     N suspect  ──► reservation elsewhere ─► TakeOver until granted [failover]
//!     otherwise  ──► wait; the guest runs, or its disks wait
//! ```
//!
//! Each file below is one chapter. It reads the [`PlanContext`] and returns a [`Step`]; this file
//! decides which chapters speak and makes the plan of their steps.

mod context;
mod delete;
mod drain;
mod failover;
mod import;
mod initial_status;
mod lifecycle;
mod migration;
mod panics;
mod place;
mod protection;
mod reservation;
mod running;
mod shutdown;
mod step;

#[cfg(test)]
mod tests;

use bascule_crds::names::reason;
use bascule_ipc::vm::VmState;
use bascule_types::{Change, Owner};

use self::context::PlanContext;
use self::place::Place;
use self::reservation::update_reservations;
use self::step::{ReportChange, Step};
use crate::observed::RowView;
use crate::{Action, Fact, Moment, NodeHealth, Observed, Phase, Plan, VmIntent};

/// What to do next for one virtual machine. See the crate's documentation.
#[must_use]
pub fn plan(intent: &VmIntent, observed: &Observed, now: Moment) -> Plan {
    let context = PlanContext {
        intent,
        observed,
        now,
    };
    context
        .decide()
        .into_plan(initial_status::initial(intent, observed, now))
}

impl<'a> PlanContext<'a> {
    fn decide(&self) -> Step {
        if self.intent.deleting_since.is_some() {
            return self.delete();
        }
        if !self.intent.finalizer {
            return Step::action(Action::AddFinalizer);
        }
        match &self.observed.volume {
            Fact::Absent => {
                let message = format!("SharedVolume {} does not exist", self.intent.volume);
                return Step::ready(Phase::Pending, false, reason::VOLUME_MISSING, message);
            }
            Fact::Unknown => {
                let message = format!("nothing is known of volume {}", self.intent.volume);
                return self.not_known(reason::UNKNOWN, message);
            }
            Fact::Known(_) => {}
        }
        match &self.observed.row {
            Fact::Unknown => self.row_unknown(),
            Fact::Absent => self.create_row(),
            Fact::Known(row) => self.with_row(row),
        }
    }

    /// No node can tell who owns the virtual machine.
    fn row_unknown(&self) -> Step {
        let volume = &self.intent.volume;
        if self.route().is_some() {
            if let Some(step) = self.suspect_last_owner() {
                return step;
            }
            let message = format!("the coordinator of volume {volume} does not answer");
            return self.not_known(reason::VOLUME_UNAVAILABLE, message);
        }
        let complaints = self.path_complaints();
        let message = if complaints.is_empty() {
            format!("no node reaches volume {volume}: kubectl describe sv {volume} says why")
        } else {
            format!("no node reaches volume {volume}: {}", complaints.join("; "))
        };
        let here = self.observed.processes.iter().find(|process| {
            process.alive && matches!(process.status.state, VmState::Running | VmState::Paused)
        });
        match here {
            // That the disks of a guest wait is known without its row.
            Some(process) if !complaints.is_empty() => {
                let mut step = self.storage_lost(&process.node, message);
                step.change(ReportChange::Node(Some(process.node.clone())));
                step
            }
            _ => self.not_known(reason::VOLUME_UNAVAILABLE, message),
        }
    }

    fn create_row(&self) -> Step {
        let Some(via) = self.route() else {
            return self.row_unknown();
        };
        let change = Change::CreateVm {
            vm: self.intent.uid,
            name: self.intent.row.clone(),
            spec_digest: self.intent.digest.0,
        };
        let message = "being recorded on the volume";
        let mut step = Step::ready(Phase::Pending, false, reason::STARTING, message);
        step.push(Action::Change { via, change });
        step.requeued_soon()
    }

    fn with_row(&self, row: &'a RowView) -> Step {
        let (Fact::Known(pods), Fact::Known(_)) = (&self.observed.pods, &self.observed.migrations)
        else {
            // The API server is unreachable or the caches are not filled: a running guest stays.
            return self.not_known(reason::UNKNOWN, "the API server has not been reached yet");
        };
        let mut step = self.end_left_reservations(row, pods);
        step.append(self.finish_committed_migration(row));
        step.append(self.follow_failovers(row));
        let rest = match self.place(row) {
            Place::Nowhere => self.unowned(row),
            Place::On {
                node,
                health,
                owner,
            } => {
                step.change(ReportChange::Node(Some(node.clone())));
                self.owned(row, &node, owner, health)
            }
            Place::UnknownHolder { owner } => {
                let message = format!("owned by {owner}, which no known node holds");
                self.not_known(reason::NODE_UNREACHABLE, message)
            }
        };
        step.append(rest);
        step.append(update_reservations(pods));
        step.append(self.remove_foreign_pods());
        step
    }

    /// A node owns the virtual machine.
    fn owned(&self, row: &'a RowView, node: &str, owner: Owner, health: NodeHealth) -> Step {
        match health {
            NodeHealth::Healthy => self.owned_by_healthy(row, node, owner),
            NodeHealth::Suspect => self.failover(row, node, owner),
            NodeHealth::StorageLost => {
                let message = format!("{node} has lost its path to the volume; the guest waits");
                self.storage_lost(node, message)
            }
            NodeHealth::Isolated => {
                let message =
                    format!("bascule-node on {node} does not answer; the guest runs on there");
                let reason = reason::NODE_UNREACHABLE;
                let mut step = Step::ready(Phase::Running, false, reason, message);
                step.change(ReportChange::Protected(self.protection(node)));
                step.requeued_soon()
            }
            NodeHealth::Undetermined => {
                let message = format!("no report from {node}");
                self.not_known(reason::NODE_UNREACHABLE, message)
            }
        }
    }

    fn owned_by_healthy(&self, row: &'a RowView, node: &str, owner: Owner) -> Step {
        let process = self.process_of(row, node).filter(|process| process.alive);
        let Some(process) = process else {
            return self.idle(row, node, owner);
        };
        match &process.status.state {
            VmState::Running | VmState::Paused => self.running(row, node, process),
            VmState::Incoming if !self.arrival_expected(row, process) => {
                // It was built for another attempt, or for one whose guest is lost.
                Step::action(Action::CollectVm {
                    node: node.to_owned(),
                    pid: process.status.pid,
                })
                .requeued_soon()
            }
            VmState::Starting | VmState::Incoming => {
                let message = format!("starting on {node}");
                Step::ready(Phase::Starting, false, reason::STARTING, message).requeued_soon()
            }
            // A row that still names a node which the guest has left is out of date.
            VmState::InDoubt | VmState::Departed => {
                let message = "waiting for the volume to say which side the guest is on";
                Step::ready(Phase::Migrating, false, reason::MIGRATING, message).requeued_soon()
            }
            VmState::Stopped(_) => self.idle(row, node, owner),
        }
    }

    fn storage_lost(&self, node: &str, message: String) -> Step {
        let mut step = Step::ready(Phase::Running, false, reason::STORAGE_LOST, message);
        step.change(ReportChange::Protected(self.protection(node)));
        step.requeued_soon()
    }
}
