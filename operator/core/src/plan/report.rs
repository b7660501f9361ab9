//! The status before anything is known: what was known before.

use bascule_api::names::reason;

use crate::{Condition, Fact, Moment, Observed, VmIntent, VmPhase, VmReport};

/// The report that the chapters fill in.
pub(super) fn initial(intent: &VmIntent, observed: &Observed, now: Moment) -> VmReport {
    let (phase, ready) = if observed.history.was_running {
        let message = "nothing is known at present; the guest may well be running";
        (
            VmPhase::Unknown,
            Condition::new(None, reason::UNKNOWN, message),
        )
    } else {
        (
            VmPhase::Pending,
            Condition::new(Some(false), reason::STARTING, "being looked at"),
        )
    };
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
        phase,
        node: None,
        ready,
        protected: Condition::new(Some(false), reason::NOT_RUNNING, "the guest does not run"),
        imported,
        restart_required: false,
        migration: None,
        stopping_since: observed.history.stopping_since,
        completed: observed.history.completed && intent.run == crate::RunPolicy::OnFailure,
        restarts: intent.restart.recent(&observed.history.restarts, now),
        stop_reason: None,
    }
}
