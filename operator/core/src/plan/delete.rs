//! Deletion of a virtual machine: stops the guest, deletes or keeps the disks, deletes the row, then
//! the pods.

use bascule_crds::names::reason;
use bascule_ipc::vm::VmState;
use bascule_types::{Change, DiskRow, Owner};

use super::context::PlanContext;
use super::place::Place;
use super::step::{Ready, Step};
use crate::observed::RowView;
use crate::{Action, Fact, NodeHealth, Phase, Stream};

impl<'a> PlanContext<'a> {
    pub(super) fn delete(&self) -> Step {
        let being_deleted =
            || Ready::new(Phase::Deleting, false, reason::DELETING, "being deleted");
        if !self.intent.finalizer {
            return Step::new().with_ready(being_deleted());
        }
        let step = match (&self.observed.volume, &self.observed.row) {
            // Without its volume there is nothing to clean up.
            (Fact::Absent, _) | (Fact::Known(_), Fact::Absent) => self.delete_pods_then_finish(),
            (Fact::Known(volume), Fact::Unknown) if !volume.identified => {
                self.delete_pods_then_finish()
            }
            (Fact::Unknown, _) | (Fact::Known(_), Fact::Unknown) => {
                let message = format!("waiting for volume {}", self.intent.volume);
                Step::ready(Phase::Deleting, false, reason::VOLUME_UNAVAILABLE, message)
            }
            (Fact::Known(_), Fact::Known(row)) => self.delete_row(row),
        };
        step.requeued_soon().or_ready(being_deleted)
    }

    fn delete_row(&self, row: &'a RowView) -> Step {
        let mut step = Step::new();
        if let Fact::Known(pods) = &self.observed.pods {
            step.append(self.end_left_reservations(row, pods));
        }
        let unreachable = |message: String| {
            Step::ready(Phase::Deleting, false, reason::NODE_UNREACHABLE, message)
        };
        step.append(match self.place(row) {
            Place::Nowhere => self.delete_unowned(row),
            Place::On {
                node,
                owner,
                health: NodeHealth::Healthy,
            } => self.delete_owned(row, &node, owner),
            Place::On {
                node,
                owner,
                health: NodeHealth::Suspect,
            } => self.take_over_to_delete(row, &node, owner),
            Place::On { node, .. } => {
                unreachable(format!("waiting for node {node}, which owns it"))
            }
            Place::UnknownHolder { owner } => {
                unreachable(format!("owned by {owner}, which no known node holds"))
            }
        });
        step
    }

    fn delete_owned(&self, row: &'a RowView, node: &str, owner: Owner) -> Step {
        let mut step = Step::new();
        let Some(process) = self.process_of(row, node).filter(|process| process.alive) else {
            step.append(self.collect_all());
            step.append(self.cancel_imports(node, row));
            step.append(self.release(row, node, owner));
            return step;
        };
        let (active, refused) = self.select_migration();
        step.append(refused);
        if let Some(migration) = active {
            let superseded = reason::SUPERSEDED;
            step.append(self.give_up_migration(row, node, process, migration, superseded));
        }
        match &process.status.state {
            VmState::Running | VmState::Paused => {
                step.append(self.shut_down(node));
                let message = "waiting for the guest to shut down";
                let stopping = Ready::new(Phase::Deleting, false, reason::STOPPING, message);
                step.with_ready(stopping)
            }
            VmState::Stopped(_) | VmState::Departed => {
                step.append(self.collect_all());
                step.append(self.release(row, node, owner));
                step
            }
            VmState::Starting | VmState::Incoming | VmState::InDoubt => step,
        }
    }

    /// The volume refuses to delete the record of an owned virtual machine, and this owner cannot release it.
    fn take_over_to_delete(&self, row: &RowView, node: &str, owner: Owner) -> Step {
        let message =
            format!("{node} does not respond; takeover requested, which needs a fence proof");
        let mut step = Step::ready(Phase::Deleting, false, reason::NODE_SUSPECT, message);
        let Some(via) = self.route() else {
            return step;
        };
        if let Ok(to) = self.can_host(&via) {
            let change = Change::TakeOver {
                vm: self.intent.uid,
                from: owner,
                epoch: row.epoch,
                to,
            };
            step.push(Action::Change { via, change });
        }
        step
    }

    fn delete_unowned(&self, row: &RowView) -> Step {
        let mut step = self.collect_all();
        let Some(via) = self.route() else {
            return step;
        };
        for disk in row
            .disks
            .iter()
            .filter(|disk| disk.vm == Some(self.intent.uid))
        {
            let intent = self
                .intent
                .disks
                .iter()
                .find(|intent| intent.row == disk.name);
            // An incomplete import cannot be attached again.
            let goes = disk.importing || intent.is_some_and(|intent| intent.delete_with_vm);
            if goes {
                let change = Change::DeleteDisk { disk: disk.disk };
                let via = self.importer_of(disk).unwrap_or_else(|| via.clone());
                step.push(Action::Change { via, change });
            }
        }
        let change = Change::DeleteVm {
            vm: self.intent.uid,
        };
        step.push(Action::Change { via, change });
        step
    }

    /// The node that was filling a disk: while its lease is valid, the volume lets no other node delete it.
    fn importer_of(&self, disk: &DiskRow) -> Option<String> {
        let importer = disk.importer?;
        let mut nodes = self.observed.nodes.iter();
        let found = nodes.find(|(_, node)| {
            let owner = node.access.known().and_then(|access| access.owner);
            node.stream == Stream::Up && owner == Some(importer)
        });
        found.map(|(name, _)| name.clone())
    }

    fn delete_pods_then_finish(&self) -> Step {
        let Fact::Known(pods) = &self.observed.pods else {
            return Step::new();
        };
        let mut step = self.collect_all();
        for pod in pods {
            let answers = pod.node.as_ref().is_some_and(|node| {
                self.observed
                    .nodes
                    .get(node)
                    .is_some_and(|n| n.stream == Stream::Up)
            });
            // Its guest is gone, so its kubelet need not confirm the deletion.
            step.append(self.delete_reservation(pod, pod.node.is_some() && !answers));
            if let (Some(node), true) = (&pod.node, answers && pod.deleting) {
                step.append(self.end_reservation(node, pod));
            }
        }
        if pods.is_empty() {
            step.push(Action::RemoveFinalizer);
        }
        step
    }

    fn collect_all(&self) -> Step {
        let mut step = Step::new();
        for process in &self.observed.processes {
            let over = !process.alive
                || matches!(
                    process.status.state,
                    VmState::Stopped(_) | VmState::Departed | VmState::Incoming
                );
            if over {
                step.push(Action::CollectVm {
                    node: process.node.clone(),
                    pid: process.status.pid,
                });
            }
        }
        step
    }
}
