//! A virtual machine that is being deleted: guest down, disks away as asked, row away, pods away.

use bascule_crds::names::reason;
use bascule_ipc::vm::VmState;
use bascule_types::{Change, DiskRow, Owner};

use super::Planner;
use super::place::Place;
use crate::observed::RowView;
use crate::{Action, Fact, NodeHealth, Phase, Stream};

impl<'a> Planner<'a> {
    pub(super) fn delete(&mut self) {
        self.ready(Phase::Deleting, false, reason::DELETING, "being deleted");
        if !self.intent.finalizer {
            return;
        }
        self.requeue_soon();
        match (&self.observed.volume, &self.observed.row) {
            // Without its volume there is nothing to clean up, and nobody to ask.
            (Fact::Absent, _) | (Fact::Known(_), Fact::Absent) => self.delete_pods_then_finish(),
            (Fact::Known(volume), Fact::Unknown) if !volume.identified => {
                self.delete_pods_then_finish();
            }
            (Fact::Unknown, _) | (Fact::Known(_), Fact::Unknown) => {
                let message = format!("waiting for volume {}", self.intent.volume);
                self.ready(Phase::Deleting, false, reason::VOLUME_UNAVAILABLE, message);
            }
            (Fact::Known(_), Fact::Known(row)) => self.delete_row(row),
        }
    }

    fn delete_row(&mut self, row: &'a RowView) {
        if let Fact::Known(pods) = &self.observed.pods {
            self.end_left_reservations(row, pods);
        }
        match self.place(row) {
            Place::Nowhere => self.delete_unowned(row),
            Place::On {
                node,
                owner,
                health: NodeHealth::Healthy,
            } => {
                self.delete_owned(row, &node, owner);
            }
            Place::On {
                node,
                owner,
                health: NodeHealth::Suspect,
            } => {
                self.take_over_to_delete(row, &node, owner);
            }
            Place::On { node, .. } => {
                let message = format!("waiting for node {node}, which owns it");
                self.ready(Phase::Deleting, false, reason::NODE_UNREACHABLE, message);
            }
            Place::UnknownHolder { owner } => {
                let message = format!("owned by {owner}, which no known node holds");
                self.ready(Phase::Deleting, false, reason::NODE_UNREACHABLE, message);
            }
        }
    }

    fn delete_owned(&mut self, row: &'a RowView, node: &str, owner: Owner) {
        let Some(process) = self
            .process_of(row, node)
            .filter(|process| process.alive)
            .cloned()
        else {
            self.collect_all();
            return self.release(row, node, owner);
        };
        if let Some(migration) = self.select_migration() {
            self.give_up_migration(row, node, &process, migration, reason::SUPERSEDED);
        }
        match &process.status.state {
            VmState::Running | VmState::Paused => {
                self.stop(node);
                self.ready(
                    Phase::Deleting,
                    false,
                    reason::STOPPING,
                    "asked to shut down",
                );
            }
            VmState::Stopped(_) | VmState::Departed => {
                self.collect_all();
                self.release(row, node, owner);
            }
            VmState::Starting | VmState::Incoming | VmState::InDoubt => {}
        }
    }

    /// A row cannot be deleted while it has an owner, and this one will never release it.
    fn take_over_to_delete(&mut self, row: &RowView, node: &str, owner: Owner) {
        let message = format!("{node} is silent; asking the volume for a proof");
        self.ready(Phase::Deleting, false, reason::NODE_SUSPECT, message);
        let Some(via) = self.route() else { return };
        if let Ok(to) = self.can_host(&via) {
            let change = Change::TakeOver {
                vm: self.intent.uid,
                from: owner,
                epoch: row.epoch,
                to,
            };
            self.push(Action::Change { via, change });
        }
    }

    fn delete_unowned(&mut self, row: &RowView) {
        self.collect_all();
        let Some(via) = self.route() else { return };
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
            // A half-filled disk is of no use to anybody.
            let goes = disk.importing || intent.is_some_and(|intent| intent.delete_with_vm);
            if goes {
                let change = Change::DeleteDisk { disk: disk.disk };
                let via = self.importer_of(disk).unwrap_or_else(|| via.clone());
                self.push(Action::Change { via, change });
            }
        }
        let change = Change::DeleteVm {
            vm: self.intent.uid,
        };
        self.push(Action::Change { via, change });
    }

    /// The node that was filling a disk: while it lives, the volume lets nobody else delete it.
    fn importer_of(&self, disk: &DiskRow) -> Option<String> {
        let importer = disk.importer?;
        let mut nodes = self.observed.nodes.iter();
        let found = nodes.find(|(_, node)| {
            let owner = node.access.known().and_then(|access| access.owner);
            node.stream == Stream::Up && owner == Some(importer)
        });
        found.map(|(name, _)| name.clone())
    }

    fn delete_pods_then_finish(&mut self) {
        let Fact::Known(pods) = &self.observed.pods else {
            return;
        };
        self.collect_all();
        for pod in pods {
            let answers = pod.node.as_ref().is_some_and(|node| {
                self.observed
                    .nodes
                    .get(node)
                    .is_some_and(|n| n.stream == Stream::Up)
            });
            // No guest stands behind it any more, so nobody needs to wait for its kubelet.
            self.delete_reservation(pod, pod.node.is_some() && !answers);
            if let (Some(node), true) = (&pod.node, answers && pod.deleting) {
                self.push(Action::EndReservation {
                    node: node.clone(),
                    pod_uid: pod.uid.clone(),
                });
            }
        }
        if pods.is_empty() {
            self.push(Action::RemoveFinalizer);
        }
    }

    fn collect_all(&mut self) {
        for process in &self.observed.processes {
            let over = !process.alive
                || matches!(
                    process.status.state,
                    VmState::Stopped(_) | VmState::Departed | VmState::Incoming
                );
            if over {
                self.push(Action::CollectVm {
                    node: process.node.clone(),
                    pid: process.status.pid,
                });
            }
        }
    }
}
