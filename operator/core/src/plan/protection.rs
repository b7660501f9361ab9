//! The Protected condition.

use bascule_crds::names::reason;
use bascule_ipc::volume::{FencingMode, WatchdogKind};

use super::context::PlanContext;
use crate::{Condition, FailurePolicy};

impl PlanContext<'_> {
    /// Whether the guest would survive the loss of `node`, and if not why (I8).
    pub(super) fn protection(&self, node: &str) -> Condition {
        let not = |reason, message: String| Condition::new(Some(false), reason, message);
        let Some(volume) = self.observed.volume.known() else {
            return Condition::new(None, reason::UNKNOWN, "the volume is not known");
        };
        if self.intent.on_failure == FailurePolicy::Leave {
            let message = "availability.onNodeFailure is Leave";
            return not(reason::POLICY_LEAVE, message.to_owned());
        }
        if volume.file {
            let message = format!("volume {} is a file", self.intent.volume);
            return not(reason::FILE_BACKING, message);
        }
        if volume.fencing == FencingMode::LeaseOnly {
            let message = format!(
                "volume {} has fencing LeaseOnly: a restart elsewhere needs a manual fencing confirmation",
                self.intent.volume
            );
            return not(reason::FENCING_MANUAL, message);
        }
        let access = self
            .observed
            .nodes
            .get(node)
            .and_then(|view| view.access.known());
        let Some(access) = access else {
            let message = format!("it is not known how {node} reaches the volume");
            return Condition::new(None, reason::UNKNOWN, message);
        };
        if access.watchdog == WatchdogKind::None {
            let message = format!("node {node} has no watchdog: {NEEDS_CONFIRMATION}");
            return not(reason::NO_WATCHDOG, message);
        }
        if !self
            .observed
            .nodes
            .keys()
            .any(|name| name != node && self.can_host(name).is_ok())
        {
            let message = format!(
                "no other node can run guests of volume {}",
                self.intent.volume
            );
            return not(reason::NO_OTHER_NODE, message);
        }
        let message = format!("if {node} is lost, it starts elsewhere");
        Condition::new(Some(true), reason::PROTECTED, message)
    }
}

const NEEDS_CONFIRMATION: &str = "a restart elsewhere needs a manual fencing confirmation";
