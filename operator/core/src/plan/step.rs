//! What one chapter of a plan decides: actions, changes of the status, when to plan again.
//!
//! Chapters return a [`Step`] and the caller appends it to its own. Actions and changes keep their
//! order. At most one of the appended steps may set the Ready condition; `plan.rs` writes it.

use std::time::Duration;

use bascule_types::AttemptId;

use crate::{Action, Condition, FailedImports, Moment, Phase, VmReport};

#[derive(Debug)]
#[must_use]
pub(super) struct Step {
    pub(super) actions: Vec<Action>,
    changes: Vec<ReportChange>,
    /// None leaves the caller's.
    pub(super) ready: Option<Ready>,
    pub(super) requeue: Duration,
}

/// The phase and the Ready condition, which always change together.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) phase: Phase,
    pub(super) condition: Condition,
}

impl Ready {
    /// `ready` is the condition's status; none is Unknown.
    pub(super) fn new(
        phase: Phase,
        ready: impl Into<Option<bool>>,
        reason: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self {
            phase,
            condition: Condition::new(ready.into(), reason, message),
        }
    }
}

/// A change of one field of the [`VmReport`], other than the phase and the Ready condition.
#[derive(Debug)]
pub(super) enum ReportChange {
    Node(Option<String>),
    Protected(Condition),
    Imported(Condition),
    RestartRequired(Option<bool>),
    /// A migration is under way.
    Migration(String),
    /// This migration has ended.
    MigrationEnded(String),
    StoppingSince(Option<Moment>),
    Completed,
    Restarted(Moment),
    StopReason(String),
    /// The panics of the guest's kernel, and how many of them are news.
    Panics(u32, u32),
    /// The failed attempts to import the disk of this name.
    ImportFailed(String, FailedImports),
    TargetLost(AttemptId, Moment),
    /// Nothing is known since then. `keep` leaves the status as it was, `node` is the last known node.
    Unknown {
        since: Moment,
        keep: bool,
        node: Option<String>,
    },
}

impl ReportChange {
    fn apply(self, report: &mut VmReport) {
        match self {
            Self::Node(node) => report.node = node,
            Self::Protected(condition) => report.protected = condition,
            Self::Imported(condition) => report.imported = condition,
            Self::RestartRequired(required) => report.restart_required = required,
            Self::Migration(name) => report.migration = Some(name),
            Self::MigrationEnded(name) => {
                report.migration.take_if(|current| *current == name);
            }
            Self::StoppingSince(since) => report.stopping_since = since,
            Self::Completed => report.completed = true,
            Self::Restarted(at) => report.restarts.push(at),
            Self::StopReason(why) => report.stop_reason = Some(why),
            Self::Panics(all, new) => {
                report.panics = all;
                report.new_panics = new;
            }
            Self::ImportFailed(disk, failed) => {
                report.failed_imports.insert(disk, failed);
            }
            Self::TargetLost(attempt, since) => report.target_lost = Some((attempt, since)),
            Self::Unknown { since, keep, node } => {
                report.unknown_since = Some(since);
                report.keep = keep;
                report.node = report.node.take().or(node);
            }
        }
    }
}

impl Step {
    pub(super) const fn new() -> Self {
        Self {
            actions: vec![],
            changes: vec![],
            ready: None,
            requeue: REQUEUE_IDLE,
        }
    }

    /// Only the Ready condition.
    pub(super) fn ready(
        phase: Phase,
        ready: impl Into<Option<bool>>,
        reason: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self::new().with_ready(Ready::new(phase, ready, reason, message))
    }

    /// Only one action.
    pub(super) fn action(action: Action) -> Self {
        let mut step = Self::new();
        step.push(action);
        step
    }

    /// Replaces the Ready condition.
    pub(super) fn with_ready(mut self, ready: Ready) -> Self {
        self.ready = Some(ready);
        self
    }

    /// Sets the Ready condition unless the step has one.
    pub(super) fn or_ready(mut self, otherwise: impl FnOnce() -> Ready) -> Self {
        self.ready = self.ready.or_else(|| Some(otherwise()));
        self
    }

    pub(super) fn requeued_soon(mut self) -> Self {
        self.requeue_soon();
        self
    }

    pub(super) fn push(&mut self, action: Action) {
        self.actions.push(action);
    }

    pub(super) fn change(&mut self, change: ReportChange) {
        self.changes.push(change);
    }

    pub(super) fn event(
        &mut self,
        reason: &'static str,
        warning: bool,
        message: impl Into<String>,
    ) {
        self.push(Action::Event {
            reason,
            message: message.into(),
            warning,
        });
    }

    /// Adds what another chapter decided after this one.
    pub(super) fn append(&mut self, other: Self) {
        debug_assert!(
            self.ready.is_none() || other.ready.is_none(),
            "two chapters set the Ready condition: {self:?} and {other:?}"
        );
        self.actions.extend(other.actions);
        self.changes.extend(other.changes);
        self.ready = other.ready.or_else(|| self.ready.take());
        self.requeue_within(other.requeue);
    }

    /// For an operation under way whose end no report and no watch announces.
    pub(super) fn requeue_soon(&mut self) {
        self.requeue_within(REQUEUE_BUSY);
    }

    pub(super) fn requeue_within(&mut self, wait: Duration) {
        self.requeue = self.requeue.min(wait);
    }

    /// Carries the changes out on the report that the plan began with.
    pub(super) fn into_plan(self, mut report: VmReport) -> crate::Plan {
        for change in self.changes {
            change.apply(&mut report);
        }
        if let Some(ready) = self.ready {
            report.phase = ready.phase;
            report.ready = ready.condition;
        }
        crate::Plan {
            actions: self.actions,
            report,
            requeue: self.requeue,
        }
    }
}

/// Reports and watches trigger a plan at once; this period only covers those that were missed.
const REQUEUE_IDLE: Duration = Duration::from_secs(30);
/// Poll interval while something is under way that nothing announces, such as a fence proof.
const REQUEUE_BUSY: Duration = Duration::from_secs(1);
