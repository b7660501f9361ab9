//! A guest that runs on a healthy node.

use std::time::Duration;

use bascule_crds::names::reason;
use bascule_ipc::vm::VmState;
use bascule_ipc::volume::{FencingMode, WatchdogKind};

use super::Planner;
use super::reservation::leaving;
use crate::observed::RowView;
use crate::{
    Action, Condition, FailurePolicy, Migration, Phase, PodPhase, Process, Purpose, RunPolicy,
};

impl<'a> Planner<'a> {
    pub(super) fn running(&mut self, row: &'a RowView, node: &str, process: &Process) {
        self.ready(
            Phase::Running,
            true,
            reason::RUNNING,
            format!("running on {node}"),
        );
        if process.status.io_stalled {
            let message = format!("the disks of the guest on {node} wait for the node's lease");
            self.ready(Phase::Running, false, reason::STORAGE_LOST, message);
            self.requeue_soon();
        }
        self.report.protected = self.protection(node);
        let pod = self.pod_on(node);
        self.report.restart_required = pod.map(|pod| pod.digest != self.intent.digest);
        let active = self.select_migration();
        self.drop_stray_reservations(node, active);
        let ending = self.observed.memory.namespace_ending;
        if self.intent.run == RunPolicy::Stopped || ending {
            if let Some(migration) = active {
                self.give_up_migration(row, node, process, migration, reason::SUPERSEDED);
            }
            self.stop(node);
            if ending {
                self.ready(Phase::Stopping, false, reason::DELETING, NAMESPACE_ENDS);
            }
            return;
        }
        let evacuate = pod.and_then(|pod| pod.leaving_since);
        if let Some(migration) = active {
            self.report.migration = Some(migration.name.clone());
            self.drive_migration(row, node, process, migration);
        } else if let (Some(pod), Some(since)) = (pod, evacuate) {
            self.evacuate(node, pod, since);
        } else {
            self.report.stopping_since = None;
        }
        if evacuate.is_none() || pod.is_some_and(|pod| pod.phase == PodPhase::Failed) {
            self.ensure_reservation(row, node);
        }
        self.promote(node, active);
        if active.is_none() {
            self.collect_left_overs(row, node);
        }
    }

    /// Processes of earlier tenures, and destinations of attempts that are over. While an attempt is
    /// under way its source's process is kept, because it has the figures.
    fn collect_left_overs(&mut self, row: &RowView, node: &str) {
        for process in &self.observed.processes {
            let status = &process.status;
            let over = match status.state {
                VmState::Departed | VmState::Stopped(_) => status.epoch < row.epoch,
                VmState::Incoming => process.node != node || status.epoch < row.epoch,
                _ => !process.alive && status.epoch < row.epoch,
            };
            if over {
                let node = process.node.clone();
                self.actions.push(Action::CollectVm {
                    node,
                    pid: status.pid,
                });
            }
        }
    }

    /// Presses the power button, and forces the guest off when it does not heed it in time.
    pub(super) fn stop(&mut self, node: &str) {
        let since = *self.report.stopping_since.get_or_insert(self.now);
        let patience = self.intent.budgets.shutdown;
        let waited = self.now.since(since);
        self.ready(
            Phase::Stopping,
            false,
            reason::STOPPING,
            "asked to shut down",
        );
        self.requeue_soon();
        if waited >= patience {
            return self.push(Action::StopVm {
                node: node.to_owned(),
            });
        }
        let pressed = self.observed.memory.power_button;
        if pressed.is_none_or(|at| self.now.since(at) >= POWER_BUTTON_AGAIN) {
            self.push(Action::PowerButton {
                node: node.to_owned(),
            });
        }
    }

    /// Pods elsewhere that no migration under way has asked for.
    fn drop_stray_reservations(&mut self, node: &str, active: Option<&Migration>) {
        let chosen = self
            .pod_on(node)
            .filter(|pod| !leaving(pod))
            .map(|pod| &pod.uid);
        for pod in self.pods() {
            let here =
                pod.node.as_deref() == Some(node) && chosen.is_none_or(|chosen| *chosen == pod.uid);
            let wanted = match (&pod.purpose, active) {
                (Purpose::Migration(name), Some(migration)) => *name == migration.name,
                (Purpose::Migration(_), None) => false,
                // One that is being made again here is not bound yet.
                (Purpose::Current, _) => pod.node.is_none() && chosen.is_none(),
            };
            if !here && !wanted {
                self.delete_reservation(pod, false);
            }
        }
    }

    /// The pod under a guest that has arrived is no longer a migration's.
    fn promote(&mut self, node: &str, active: Option<&Migration>) {
        let Some(pod) = self.pod_on(node) else { return };
        if let (Purpose::Migration(name), false) = (&pod.purpose, leaving(pod))
            && active.is_none_or(|migration| migration.name != *name)
        {
            self.push(Action::PromoteReservation {
                name: pod.name.clone(),
                uid: pod.uid.clone(),
            });
        }
    }

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
                "volume {} has fencing LeaseOnly: a restart elsewhere needs an administrator's fencing confirmation",
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

const NEEDS_CONFIRMATION: &str =
    "a restart elsewhere needs an administrator's fencing confirmation";
const NAMESPACE_ENDS: &str = "its namespace is being deleted: asked to shut down";
/// A guest that is busy booting does not hear the first press.
const POWER_BUTTON_AGAIN: Duration = Duration::from_secs(15);
