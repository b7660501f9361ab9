//! What nodes and their processes do by themselves.

use bascule_ipc::vm::{self, StopReason, VmState};
use bascule_types::{Epoch, Generation, Owner};

use crate::SavedView;

use super::{Guest, HEARTBEAT_LOST, Move, Node, WATCHDOG, World};

impl World {
    pub(super) fn nodes_step(&mut self) {
        let names: Vec<String> = self.nodes.keys().cloned().collect();
        for name in &names {
            let node = self.nodes.get_mut(name).unwrap();
            if node.powered && node.storage {
                let joined = node.owner.generation.0 % 2 == 1;
                let lapsed = node.steps_without_heartbeat >= HEARTBEAT_LOST && joined;
                node.steps_without_heartbeat = 0;
                let owner = node.owner;
                if lapsed {
                    self.rejoin(name, owner, false);
                }
            } else {
                node.steps_without_heartbeat += 1;
                if node.steps_without_heartbeat == WATCHDOG && node.powered {
                    node.powered = false;
                    node.processes.clear();
                    self.note(format!("{name} reset by its watchdog"));
                }
            }
        }
        for name in &names {
            self.boot(name);
            let count = self.nodes[name].processes.len();
            for index in 0..count {
                self.guest_step(name, index);
            }
        }
    }

    /// A node that has come up begins a new generation; rows of the old one are released, because
    /// no process of it exists any more.
    pub(super) fn boot(&mut self, name: &str) {
        let node = &self.nodes[name];
        if node.powered && node.storage && node.owner.generation.0.is_multiple_of(2) {
            let owner = node.owner;
            self.rejoin(name, owner, true);
        }
    }

    pub(super) fn rejoin(&mut self, name: &str, from: Owner, rebooted: bool) {
        // Even generations mark a node that was switched on and has not joined yet.
        let step = if rebooted { 1 } else { 2 };
        let to = Owner {
            slot: from.slot,
            generation: Generation(from.generation.0 + step),
        };
        let before = if rebooted {
            Owner {
                slot: from.slot,
                generation: Generation(from.generation.0 - 1),
            }
        } else {
            from
        };
        self.nodes.get_mut(name).unwrap().owner = to;
        let Some(row) = &mut self.row else { return };
        let fenced = row.fences.iter().any(|fence| fence.victim == before);
        if row.owner == Some(before) && !fenced {
            row.owner = (!rebooted).then_some(to);
        }
        let kept = row.owner == Some(to);
        for guest in &mut self.nodes.get_mut(name).unwrap().processes {
            if kept {
                guest.owner = to;
            } else if guest.owner == before && guest.state == VmState::Running {
                // Its row is not its own any more: it kills itself.
                guest.alive = false;
            }
        }
    }

    pub(super) fn guest_step(&mut self, name: &str, index: usize) {
        let node = &self.nodes[name];
        if !node.powered || !node.storage {
            return;
        }
        let guest = node.processes[index].clone();
        if !guest.alive {
            return;
        }
        let mut next = guest.clone();
        match &guest.state {
            VmState::Starting => next.state = VmState::Running,
            VmState::Running | VmState::Paused if guest.moving.is_some() => {
                self.move_step(name, &mut next);
            }
            VmState::Running if guest.power_button => {
                next.state = VmState::Stopped(StopReason::GuestShutdown);
                self.release(guest.owner, guest.epoch);
            }
            VmState::InDoubt => self.move_step(name, &mut next),
            _ => {}
        }
        self.nodes.get_mut(name).unwrap().processes[index] = next;
    }

    pub(super) fn release(&mut self, owner: Owner, epoch: Epoch) {
        if let Some(row) = &mut self.row
            && row.owner == Some(owner)
            && row.epoch == epoch
        {
            row.owner = None;
        }
    }

    pub(super) fn move_step(&mut self, name: &str, guest: &mut Guest) {
        let Some(mut moving) = guest.moving.clone() else {
            return;
        };
        let target = self.node_of(moving.to);
        let incoming = target.as_ref().is_some_and(|t| {
            moving.quick
                || self.nodes[t]
                    .processes
                    .iter()
                    .any(|p| p.alive && p.incoming == Some(moving.attempt))
        });
        let fails = self.migrations_fail && self.chance(3);
        moving.phase = match moving.phase {
            vm::MigrationPhase::Preparing if fails || !incoming => vm::MigrationPhase::Failed,
            vm::MigrationPhase::Preparing => vm::MigrationPhase::PreCopy,
            vm::MigrationPhase::PreCopy if fails || self.migrations_fail => {
                vm::MigrationPhase::NotConverging
            }
            vm::MigrationPhase::PreCopy if !incoming => vm::MigrationPhase::Failed,
            vm::MigrationPhase::PreCopy => {
                guest.state = VmState::Paused;
                vm::MigrationPhase::Stopping
            }
            vm::MigrationPhase::Stopping if !incoming => {
                guest.state = VmState::Running;
                vm::MigrationPhase::Failed
            }
            vm::MigrationPhase::Stopping => {
                guest.state = VmState::InDoubt;
                vm::MigrationPhase::Committing
            }
            // The volume gives nothing to a generation that is over.
            vm::MigrationPhase::Committing if target.is_none() => {
                guest.state = VmState::Running;
                vm::MigrationPhase::Failed
            }
            vm::MigrationPhase::Committing => {
                self.commit(name, guest, &moving);
                if guest.state == VmState::Departed {
                    vm::MigrationPhase::Completed
                } else {
                    vm::MigrationPhase::Committing
                }
            }
            done => done,
        };
        guest.moving = Some(moving);
    }

    pub(super) fn commit(&mut self, name: &str, guest: &mut Guest, moving: &Move) {
        let row = self.row.as_mut().unwrap();
        if row.owner != Some(guest.owner) || row.epoch != guest.epoch {
            // The node was fenced in the meantime, so its process stops and never runs again.
            guest.alive = false;
            return;
        }
        row.owner = Some(moving.to);
        row.epoch = row.epoch.next();
        row.saved = moving.quick.then_some(SavedView {
            epoch: guest.epoch,
            complete: true,
        });
        let epoch = row.epoch;
        guest.state = VmState::Departed;
        self.note(format!(
            "{name} handed over to {} in epoch {epoch}",
            moving.to
        ));
        let Some(target) = self.node_of(moving.to) else {
            return;
        };
        for process in &mut self.nodes.get_mut(&target).unwrap().processes {
            if process.alive && process.incoming == Some(moving.attempt) {
                process.state = VmState::Running;
                process.epoch = epoch;
                process.incoming = None;
            }
        }
    }

    pub(super) fn node_of(&self, owner: Owner) -> Option<String> {
        let holds = |node: &&Node| node.owner == owner && node.powered;
        self.nodes
            .iter()
            .find(|(_, n)| holds(n))
            .map(|(name, _)| name.clone())
    }
}
