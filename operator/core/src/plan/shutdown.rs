//! Shutting a guest down: power button, then a forced stop.

use std::time::Duration;

use bascule_crds::names::reason;

use super::context::PlanContext;
use super::step::{ReportChange, Step};
use crate::{Action, Phase};

impl PlanContext<'_> {
    /// Presses the power button, and forces the guest off when it has not shut down within
    /// `budgets.shutdown`.
    pub(super) fn shut_down(&self, node: &str) -> Step {
        let since = self.observed.memory.stopping_since.unwrap_or(self.now);
        let mut step = Step::ready(
            Phase::Stopping,
            false,
            reason::STOPPING,
            "waiting for the guest to shut down",
        )
        .requeued_soon();
        step.change(ReportChange::StoppingSince(Some(since)));
        if self.now.since(since) >= self.intent.budgets.shutdown {
            step.push(Action::StopVm {
                node: node.to_owned(),
            });
            return step;
        }
        let pressed = self.observed.memory.power_button;
        if pressed.is_none_or(|at| self.now.since(at) >= POWER_BUTTON_AGAIN) {
            step.push(Action::PowerButton {
                node: node.to_owned(),
            });
        }
        step
    }
}

/// A guest that is still booting ignores the first press.
const POWER_BUTTON_AGAIN: Duration = Duration::from_secs(15);
