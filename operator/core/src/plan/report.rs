//! The status before anything is known, and when nothing is.

use std::time::Duration;

use bascule_crds::names::reason;

use super::Planner;
use crate::{Condition, Fact, Moment, Observed, Phase, VmIntent, VmReport};

/// The report that the chapters fill in.
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
        _ => Condition::new(None, reason::UNKNOWN, "the volume has not been asked yet"),
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
        completed: observed.memory.completed && intent.run == crate::RunPolicy::OnFailure,
        restarts: intent.restart.recent(&observed.memory.restarts, now),
        stop_reason: None,
    }
}

impl Planner<'_> {
    /// Too little is known to say anything. What was reported before stays for a while: a new leader
    /// has not heard from the nodes yet, and that is no news about the virtual machine.
    pub(super) fn not_known(&mut self, reason: &'static str, message: impl Into<String>) {
        self.requeue_soon();
        let reported = self.observed.memory.reported.as_ref();
        let Some(reported) = reported.filter(|reported| reported.phase != Phase::Pending) else {
            return self.ready(Phase::Pending, false, reason, message);
        };
        let since = self.observed.memory.unknown_since.unwrap_or(self.now);
        self.report.unknown_since = Some(since);
        self.report.keep = self.now.since(since) < UNKNOWN_AFTER;
        self.report.phase = Phase::Unknown;
        if self.report.node.is_none() {
            self.report.node.clone_from(&reported.node);
        }
        let message = format!("{}; the guest may well be running", message.into());
        self.report.ready = Condition::new(None, reason, message);
        let message = "nothing is known of the guest at present";
        self.report.protected = Condition::new(None, reason::UNKNOWN, message);
    }
}

/// A new leader hears from every node within a few seconds; a node that does not answer is noticed
/// after three. Longer than that, silence is what people should read.
const UNKNOWN_AFTER: Duration = Duration::from_secs(30);
