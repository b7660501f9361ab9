//! What to do next for one virtual machine.
//!
//! ```text
//!            row unknown ──► wait                       (nothing is torn down for lack of knowledge)
//!            row absent  ──► create it
//!            row unowned ──► reservation ─► bound ─► Acquire            [life, reservation]
//!  row owned by node N:
//!     N healthy  ──► imports ─► StartVm ─► runs ─► drain, migrate, stop  [import, running, drain,
//!                                                                         migration]
//!     N suspect  ──► reservation elsewhere ─► TakeOver until granted     [failover]
//!     otherwise  ──► wait; the guest runs, or its disks wait
//! ```
//!
//! One [`Planner`] lives for one call. Each file below adds the decisions of one chapter to it; the
//! chapters only ever push actions and fill in the report.

mod delete;
mod drain;
mod failover;
mod import;
mod lifecycle;
mod migration;
mod place;
mod report;
mod reservation;
mod running;

#[cfg(test)]
mod tests;

use std::time::Duration;

use bascule_crds::names::reason;
use bascule_ipc::vm::VmState;
use bascule_types::Change;

use crate::observed::RowView;
use crate::{Action, Condition, Fact, Moment, Observed, Phase, Plan, Pod, VmIntent, VmReport};

/// What to do next for one virtual machine. See the crate's documentation.
#[must_use]
pub fn plan(intent: &VmIntent, observed: &Observed, now: Moment) -> Plan {
    let mut planner = Planner {
        intent,
        observed,
        now,
        actions: vec![],
        report: report::initial(intent, observed, now),
        requeue: REQUEUE_IDLE,
    };
    planner.run();
    Plan {
        actions: planner.actions,
        report: planner.report,
        requeue: planner.requeue,
    }
}

/// One call of [`plan`].
struct Planner<'a> {
    intent: &'a VmIntent,
    observed: &'a Observed,
    now: Moment,
    actions: Vec<Action>,
    report: VmReport,
    requeue: Duration,
}

impl<'a> Planner<'a> {
    fn run(&mut self) {
        if self.intent.deleting_since.is_some() {
            return self.delete();
        }
        if !self.intent.finalizer {
            return self.push(Action::AddFinalizer);
        }
        match &self.observed.volume {
            Fact::Absent => {
                let message = format!("SharedVolume {} does not exist", self.intent.volume);
                return self.ready(Phase::Pending, false, reason::VOLUME_MISSING, message);
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

    /// No node can say who owns the virtual machine.
    fn row_unknown(&mut self) {
        let volume = &self.intent.volume;
        if self.route().is_some() {
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
                self.report.node = Some(process.node.clone());
                self.report.protected = self.protection(&process.node);
                self.ready(Phase::Running, false, reason::STORAGE_LOST, message);
                self.requeue_soon();
            }
            _ => self.not_known(reason::VOLUME_UNAVAILABLE, message),
        }
    }

    fn create_row(&mut self) {
        self.ready(
            Phase::Pending,
            false,
            reason::STARTING,
            "being recorded on the volume",
        );
        let Some(via) = self.route() else {
            return self.row_unknown();
        };
        let change = Change::CreateVm {
            vm: self.intent.uid,
            name: self.intent.row.clone(),
            spec_digest: self.intent.digest.0,
        };
        self.push(Action::Change { via, change });
        self.requeue_soon();
    }

    fn with_row(&mut self, row: &'a RowView) {
        let (Fact::Known(pods), Fact::Known(_)) = (&self.observed.pods, &self.observed.migrations)
        else {
            // The API is away or its caches are not filled: whatever runs goes on running.
            return self.not_known(reason::UNKNOWN, "the API server has not been heard of");
        };
        self.end_left_reservations(row, pods);
        self.finish_committed_migration(row);
        self.follow_failovers(row);
        match self.place(row) {
            place::Place::Nowhere => self.unowned(row),
            place::Place::On {
                node,
                health,
                owner,
            } => {
                self.report.node = Some(node.clone());
                self.owned(row, &node, owner, health);
            }
            place::Place::UnknownHolder { owner } => {
                let message = format!("owned by {owner}, which no known node holds");
                self.not_known(reason::NODE_UNREACHABLE, message);
            }
        }
    }

    fn push(&mut self, action: Action) {
        self.actions.push(action);
    }

    fn event(&mut self, reason: &'static str, warning: bool, message: impl Into<String>) {
        self.push(Action::Event {
            reason,
            message: message.into(),
            warning,
        });
    }

    fn ready(
        &mut self,
        phase: Phase,
        ready: bool,
        reason: &'static str,
        message: impl Into<String>,
    ) {
        self.report.phase = phase;
        self.report.ready = Condition::new(Some(ready), reason, message);
    }

    /// Something is expected to happen: look again soon, even if nobody says so.
    fn requeue_soon(&mut self) {
        self.within(REQUEUE_BUSY);
    }

    fn within(&mut self, wait: Duration) {
        self.requeue = self.requeue.min(wait);
    }

    fn pods(&self) -> &'a [Pod] {
        self.observed.pods.known().map_or(&[], Vec::as_slice)
    }
}

/// Reports and watches wake a plan at once; this only catches what they miss.
const REQUEUE_IDLE: Duration = Duration::from_secs(30);
/// While something is under way that nothing announces, such as the growth of a proof.
const REQUEUE_BUSY: Duration = Duration::from_secs(1);
