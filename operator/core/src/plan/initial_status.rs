//! The status that a plan begins with, and the status while the guest's state is unknown.

use std::collections::BTreeMap;
use std::time::Duration;

use bascule_crds::names::reason;

use super::context::PlanContext;
use super::step::{ReportChange, Step};
use crate::{Condition, Fact, FailedImports, Moment, Observed, Phase, VmIntent, VmReport};

/// The report that the steps of a plan change.
pub(super) fn initial(intent: &VmIntent, observed: &Observed, now: Moment) -> VmReport {
    let imported = match &observed.row {
        Fact::Known(row) => {
            let complete = intent.disks.iter().all(|disk| {
                row.disks
                    .iter()
                    .any(|r| r.name == disk.row && !r.importing && r.vm == Some(intent.uid))
            });
            if complete {
                let message = format!("everything is on volume {}", intent.volume);
                Condition::new(Some(true), reason::IMPORTED, message)
            } else {
                Condition::new(
                    Some(false),
                    reason::IMPORTING,
                    "not everything is on the volume",
                )
            }
        }
        _ => Condition::new(
            None,
            reason::UNKNOWN,
            "the disks on the volume are not known yet",
        ),
    };
    VmReport {
        keep: false,
        unknown_since: None,
        target_lost: None,
        phase: Phase::Pending,
        node: None,
        ready: Condition::new(Some(false), reason::STARTING, "being looked at"),
        protected: Condition::new(Some(false), reason::NOT_RUNNING, "the guest does not run"),
        imported,
        restart_required: None,
        migration: None,
        stopping_since: observed.memory.stopping_since,
        completed: completed_before(intent, observed),
        restarts: intent.restart.recent(&observed.memory.restarts, now),
        panics: observed.memory.panics.unwrap_or(0),
        new_panics: 0,
        stop_reason: None,
        failed_imports: failed_imports(intent, observed),
    }
}

/// The failed attempts to import disks that are not complete yet, as far as is known.
fn failed_imports(intent: &VmIntent, observed: &Observed) -> BTreeMap<String, FailedImports> {
    let is_complete = |name: &str| {
        let row = observed.row.known();
        let disk = intent.disks.iter().find(|disk| disk.name == name);
        row.zip(disk).is_some_and(|(row, disk)| {
            let mut rows = row.disks.iter();
            rows.any(|r| r.name == disk.row && !r.importing)
        })
    };
    let mut failed = observed.memory.failed_imports.clone();
    failed.retain(|name, _| !is_complete(name));
    failed
}

/// Whether the guest had shut itself down before this plan, and stays down for it.
pub(super) fn completed_before(intent: &VmIntent, observed: &Observed) -> bool {
    observed.memory.completed && intent.run == crate::RunPolicy::OnFailure
}

impl PlanContext<'_> {
    /// Too little is known to report a state. The previous status stays for [`UNKNOWN_AFTER`]: a new
    /// leader has not received the nodes' reports yet, which says nothing about the guest.
    pub(super) fn not_known(&self, reason: &'static str, message: impl Into<String>) -> Step {
        let reported = self.observed.memory.reported.as_ref();
        let Some(reported) = reported.filter(|reported| reported.phase != Phase::Pending) else {
            return Step::ready(Phase::Pending, false, reason, message).requeued_soon();
        };
        let since = self.observed.memory.unknown_since.unwrap_or(self.now);
        let message = format!("{}; the guest may well be running", message.into());
        let mut step = Step::ready(Phase::Unknown, None, reason, message).requeued_soon();
        step.change(ReportChange::Unknown {
            since,
            keep: self.now.since(since) < UNKNOWN_AFTER,
            node: reported.node.clone(),
        });
        let message = "nothing is known of the guest at present";
        step.change(ReportChange::Protected(Condition::new(
            None,
            reason::UNKNOWN,
            message,
        )));
        step
    }
}

/// A new leader receives every node's report within a few seconds, and a node that does not respond is
/// noticed after three. After this time the status says that the state is unknown.
const UNKNOWN_AFTER: Duration = Duration::from_secs(30);
