//! A guest that runs on a healthy node.

use bascule_crds::OnError;
use bascule_crds::names::reason;
use bascule_ipc::vm::{DiskError, VmState};
use bascule_types::DiskRole;

use super::context::PlanContext;
use super::reservation::leaving;
use super::step::{Ready, ReportChange, Step};
use crate::observed::RowView;
use crate::{Action, DiskIntent, Migration, Phase, PodPhase, Process, Purpose, RunPolicy};

impl<'a> PlanContext<'a> {
    /// A chapter that stops or moves the guest sets the Ready condition; else it tells whether the
    /// guest's disks respond.
    pub(super) fn running(&self, row: &'a RowView, node: &str, process: &Process) -> Step {
        let mut step = self.panics(node, process);
        step.change(ReportChange::Protected(self.protection(node)));
        let pod = self.pod_on(node);
        let outdated = pod.map(|pod| pod.digest != self.intent.digest);
        step.change(ReportChange::RestartRequired(outdated));
        let (active, refused) = self.select_migration();
        step.append(refused);
        step.append(self.drop_stray_reservations(node, active));
        if self.intent.run == RunPolicy::Stopped || self.observed.memory.namespace_ending {
            step.append(self.stop_running(row, node, process, active));
        } else {
            step.append(self.keep_running(row, node, process, active));
            step.append(self.disk_error(node, process));
        }
        if process.status.io_stalled || process.status.resets.waits.is_some() {
            step.requeue_soon();
        }
        step.or_ready(|| {
            let mut ready = self.running_condition(node, process);
            if let Some(refusal) = self.reservation_refusal(&Purpose::Current) {
                let message = &mut ready.condition.message;
                message.push_str(&format!(", without a reservation: {}", refusal.message));
            }
            ready
        })
    }

    /// A guest that is paused for a disk error runs on when that disk's errors are to be reported.
    fn disk_error(&self, node: &str, process: &Process) -> Step {
        let mut step = Step::new();
        let Some(error) = &process.status.disk_error else {
            return step;
        };
        let reports = |disk: &DiskIntent| {
            let is_it = disk.role == DiskRole::Data && disk.name == error.disk;
            is_it && disk.on_error == OnError::Report
        };
        if self.intent.disks.iter().any(reports) {
            step.push(Action::ReportDiskErrors {
                node: node.to_owned(),
                disk: error.disk.clone(),
            });
        }
        step.requeued_soon()
    }

    fn stop_running(
        &self,
        row: &RowView,
        node: &str,
        process: &Process,
        active: Option<&Migration>,
    ) -> Step {
        let mut step = Step::new();
        if let Some(migration) = active {
            let superseded = reason::SUPERSEDED;
            step.append(self.give_up_migration(row, node, process, migration, superseded));
        }
        step.append(self.shut_down(node));
        if self.observed.memory.namespace_ending {
            let ending = Ready::new(Phase::Stopping, false, reason::DELETING, NAMESPACE_ENDS);
            step = step.with_ready(ending);
        }
        step
    }

    fn keep_running(
        &self,
        row: &'a RowView,
        node: &str,
        process: &Process,
        active: Option<&'a Migration>,
    ) -> Step {
        let mut step = Step::new();
        let pod = self.pod_on(node);
        let evacuate = pod.and_then(|pod| pod.leaving_since);
        if let Some(migration) = active {
            step.change(ReportChange::Migration(migration.name.clone()));
            step.append(self.drive_migration(row, node, process, migration));
        } else if let (Some(pod), Some(since)) = (pod, evacuate) {
            step.append(self.evacuate(node, pod, since));
        } else {
            step.change(ReportChange::StoppingSince(None));
        }
        if evacuate.is_none() || pod.is_some_and(|pod| pod.phase == PodPhase::Failed) {
            step.append(self.ensure_reservation(row, node));
        }
        step.append(self.promote(node, active));
        if active.is_none() {
            step.append(self.collect_left_overs(row, node));
        }
        step
    }

    /// Processes of earlier epochs, and destinations of attempts that are over. While an attempt is
    /// under way its source's process is kept, because it has the figures.
    fn collect_left_overs(&self, row: &RowView, node: &str) -> Step {
        let mut step = Step::new();
        for process in &self.observed.processes {
            let status = &process.status;
            let over = match status.state {
                VmState::Departed => status.epoch < row.epoch,
                // On another node also the failed destination of an attempt in the present epoch.
                VmState::Stopped(_) => {
                    status.epoch < row.epoch || (process.node != node && status.epoch == row.epoch)
                }
                VmState::Incoming => process.node != node || status.epoch < row.epoch,
                _ => !process.alive && status.epoch < row.epoch,
            };
            if over {
                let node = process.node.clone();
                step.push(Action::CollectVm {
                    node,
                    pid: status.pid,
                });
            }
        }
        step
    }

    /// Pods on other nodes that no migration under way needs.
    fn drop_stray_reservations(&self, node: &str, active: Option<&Migration>) -> Step {
        let mut step = Step::new();
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
                step.append(self.delete_reservation(pod, false));
            }
        }
        step
    }

    /// The pod under a guest that has arrived is no longer a migration's.
    fn promote(&self, node: &str, active: Option<&Migration>) -> Step {
        let mut step = Step::new();
        let Some(pod) = self.pod_on(node) else {
            return step;
        };
        if let (Purpose::Migration(name), false) = (&pod.purpose, leaving(pod))
            && active.is_none_or(|migration| migration.name != *name)
        {
            step.push(Action::PromoteReservation {
                name: pod.name.clone(),
                uid: pod.uid.clone(),
            });
        }
        step
    }

    /// The Ready condition of a guest that is neither moved nor stopped.
    fn running_condition(&self, node: &str, process: &Process) -> Ready {
        if let Some(DiskError { disk, what }) = &process.status.disk_error {
            let message = format!(
                "paused on {node}: disk {disk:?}: {what}: repair the storage, then set onError of that disk to \
                 Report: the request is tried again and the guest runs on"
            );
            return Ready::new(Phase::Running, false, reason::DISK_ERROR, message);
        }
        if let Some(panicked) = self.panicked(node, process) {
            return panicked;
        }
        if let Some(waits) = &process.status.resets.waits {
            let message = format!("the guest on {node} waits {waits}");
            return Ready::new(Phase::Running, false, reason::GUEST_RESETS, message);
        }
        if process.status.io_stalled {
            let message = format!("the disks of the guest on {node} wait for the node's lease");
            return Ready::new(Phase::Running, false, reason::STORAGE_LOST, message);
        }
        let message = format!("running on {node}");
        Ready::new(Phase::Running, true, reason::RUNNING, message)
    }
}

const NAMESPACE_ENDS: &str = "its namespace is being deleted: waiting for the guest to shut down";
