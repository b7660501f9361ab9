//! A virtual machine that does not run: start it, or leave it stopped.

use bascule_crds::names::reason;
use bascule_ipc::vm::{StopReason, VmState};
use bascule_types::{Change, Owner};

use super::Planner;
use super::reservation::leaving;
use crate::observed::{RowView, SavedView};
use crate::{Action, NodeHealth, Phase, Process, Purpose, RunPolicy};

/// What the processes that have ended mean for the next start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// Nothing stands in the way.
    MayStart,
    /// Not now; the report says why.
    MayNot,
}

impl<'a> Planner<'a> {
    /// Nobody owns the row.
    pub(super) fn unowned(&mut self, row: &'a RowView) {
        self.report.restart_required = Some(false);
        self.refuse_migrations(row);
        let ended = self.ended_processes(row);
        if !self.wanted() {
            return self.stay_stopped(row);
        }
        if ended == Ended::MayNot {
            return;
        }
        if let Some((node, owner)) = self.startable_place(row, None) {
            self.ready(
                Phase::Starting,
                false,
                reason::STARTING,
                format!("starting on {node}"),
            );
            self.report.node = Some(node.clone());
            self.acquire(row, node, owner);
        }
    }

    /// A node owns the row.
    pub(super) fn owned(&mut self, row: &'a RowView, node: &str, owner: Owner, health: NodeHealth) {
        match health {
            NodeHealth::Healthy => {}
            NodeHealth::Suspect => return self.failover(row, node, owner),
            NodeHealth::StorageLost => {
                self.report.protected = self.protection(node);
                let message = format!("{node} has lost its path to the volume; the guest waits");
                self.ready(Phase::Running, false, reason::STORAGE_LOST, message);
                return self.requeue_soon();
            }
            NodeHealth::Isolated => {
                self.report.protected = self.protection(node);
                let message =
                    format!("bascule-node on {node} does not answer; the guest runs on there");
                self.ready(Phase::Running, false, reason::NODE_UNREACHABLE, message);
                return self.requeue_soon();
            }
            NodeHealth::Undetermined => {
                let message = format!("nothing is heard of {node}");
                return self.not_known(reason::NODE_UNREACHABLE, message);
            }
        }
        match self.process_of(row, node) {
            Some(process) if process.alive => match &process.status.state {
                VmState::Running | VmState::Paused => self.running(row, node, process),
                VmState::Incoming if !self.arrival_expected(row, process) => {
                    // It waited for another attempt, or for one whose guest is lost.
                    self.push(Action::CollectVm {
                        node: node.to_owned(),
                        pid: process.status.pid,
                    });
                    self.requeue_soon();
                }
                VmState::Starting | VmState::Incoming => {
                    let message = format!("starting on {node}");
                    self.ready(Phase::Starting, false, reason::STARTING, message);
                    self.requeue_soon();
                }
                // A row that still names a node which the guest has left is a stale one.
                VmState::InDoubt | VmState::Departed => {
                    let message = "waiting for the volume to say which side the guest is on";
                    self.ready(Phase::Migrating, false, reason::MIGRATING, message);
                    self.requeue_soon();
                }
                VmState::Stopped(_) => self.idle(row, node, owner),
            },
            _ => self.idle(row, node, owner),
        }
    }

    /// A healthy node owns the row, and no guest runs there.
    fn idle(&mut self, row: &RowView, node: &str, owner: Owner) {
        self.report.restart_required = Some(false);
        self.refuse_migrations(row);
        let ended = self.ended_processes(row);
        if !self.imported(row) {
            return self.import(row, node, owner);
        }
        if !self.wanted() {
            self.ready(Phase::Stopped, true, reason::STOPPED, "stopped, as asked");
            return self.release(row, node, owner);
        }
        if ended == Ended::MayNot {
            return;
        }
        let Some((place, _)) = self.startable_place(row, Some(node)) else {
            return;
        };
        self.ready(
            Phase::Starting,
            false,
            reason::STARTING,
            format!("starting on {place}"),
        );
        if place != node {
            return self.release(row, node, owner);
        }
        let saved = row.saved;
        if saved.is_some_and(|saved| saved.is_restorable(row.epoch.next())) {
            // Its process died between the end of saving and the transfer: the next tenure has it.
            return self.release(row, node, owner);
        }
        let restore = saved.is_some_and(|saved| saved.is_restorable(row.epoch));
        if let Some(saved) = saved.filter(|_| !restore) {
            self.drop_saved(node, owner, saved);
        }
        self.report_error();
        self.report.stopping_since = None;
        self.push(Action::StartVm {
            node: place,
            owner,
            epoch: row.epoch,
            restore,
        });
        self.requeue_soon();
    }

    /// Gives the room of a saved state back that nobody may be restored from.
    fn drop_saved(&mut self, node: &str, owner: Owner, saved: SavedView) {
        if saved.complete {
            let message = "its saved memory is older than its last owner; it boots from its disks";
            self.event(reason::SAVED_STATE_OUTDATED, true, message);
        }
        let change = Change::DropSavedState {
            vm: self.intent.uid,
            from: owner,
        };
        self.push(Action::Change {
            via: node.to_owned(),
            change,
        });
    }

    /// Whether the guest should run.
    pub(super) fn wanted(&self) -> bool {
        match self.intent.run {
            // Its pods go first, and the object only after them.
            _ if self.observed.memory.namespace_ending => false,
            RunPolicy::Always => true,
            RunPolicy::OnFailure => !self.report.completed,
            RunPolicy::Stopped => false,
        }
    }

    fn stay_stopped(&mut self, row: &RowView) {
        self.report.stopping_since = None;
        self.report.node = None;
        let (reason, message) = if self.report.completed {
            (reason::GUEST_SHUT_DOWN, "the guest shut itself down")
        } else {
            (reason::STOPPED, "stopped, as asked")
        };
        self.ready(Phase::Stopped, true, reason, message);
        self.delete_other_reservations(&[]);
        if self.imported(row) {
            return;
        }
        let importer = self
            .route()
            .and_then(|node| self.can_host(&node).ok().map(|o| (node, o)));
        self.ready(
            Phase::Importing,
            false,
            reason::IMPORTING,
            "images are being copied",
        );
        if let Some((node, owner)) = importer {
            self.acquire(row, node, owner);
        }
    }

    /// Collects what has ended, and accounts for restarts: a guest that ended by itself is only
    /// forgotten when its budget allows another start.
    fn ended_processes(&mut self, row: &RowView) -> Ended {
        let mut ended_as = Ended::MayStart;
        for process in &self.observed.processes {
            let answers = self.observed.nodes.get(&process.node);
            if answers.is_none_or(|node| node.stream != crate::Stream::Up) {
                continue;
            }
            let ended = match &process.status.state {
                VmState::Departed => process.status.epoch < row.epoch || !process.alive,
                // Whoever waits for a migration of an earlier tenure waits in vain.
                VmState::Incoming => process.status.epoch < row.epoch,
                VmState::Stopped(_) => true,
                _ => !process.alive,
            };
            if !ended {
                continue;
            }
            if process.status.epoch == row.epoch && self.may_restart(process) == Ended::MayNot {
                ended_as = Ended::MayNot;
                continue;
            }
            self.push(Action::CollectVm {
                node: process.node.clone(),
                pid: process.status.pid,
            });
            self.requeue_soon();
        }
        ended_as
    }

    /// Whether a guest that ended in the present tenure may be started again now.
    fn may_restart(&mut self, process: &Process) -> Ended {
        let asked = self.report.stopping_since.is_some();
        let what = match &process.status.state {
            VmState::Stopped(StopReason::GuestReset) => return Ended::MayStart,
            VmState::Departed | VmState::Incoming => return Ended::MayStart,
            VmState::Stopped(StopReason::Requested) => {
                self.report.stop_reason = Some("it was asked to stop".to_owned());
                return Ended::MayStart;
            }
            VmState::Stopped(StopReason::GuestShutdown) => {
                self.report.stop_reason = Some("the guest shut itself down".to_owned());
                if asked {
                    return Ended::MayStart;
                }
                if self.intent.run == RunPolicy::OnFailure {
                    self.report.completed = true;
                    return Ended::MayStart;
                }
                "the guest shut itself down".to_owned()
            }
            VmState::Stopped(StopReason::GuestFault { what } | StopReason::Failed { what }) => {
                what.clone()
            }
            _ => format!("its process on {} ended unexpectedly", process.node),
        };
        self.report.stop_reason = Some(what.clone());
        if asked || !self.wanted() {
            return Ended::MayStart;
        }
        let restarts = self
            .intent
            .restart
            .recent(&self.observed.memory.restarts, self.now);
        match self.intent.restart.next(&restarts, self.now) {
            Some(at) if at <= self.now => {
                self.report.restarts.push(self.now);
                self.event(reason::GUEST_FAILED, true, format!("restarting: {what}"));
                Ended::MayStart
            }
            Some(at) => {
                let wait = at.since(self.now);
                let message = format!("{what}; restarting in {} s", wait.as_secs() + 1);
                self.ready(Phase::Failed, false, reason::BACKING_OFF, message);
                self.within(wait);
                Ended::MayNot
            }
            None => {
                let message = format!("{what}; restarted {} times already", restarts.len());
                self.ready(Phase::Failed, false, reason::RESTARTS_EXHAUSTED, message);
                Ended::MayNot
            }
        }
    }

    /// The node of a reservation on which the guest can be started now. Asks for a reservation when
    /// there is none, and reports what is being waited for.
    fn startable_place(&mut self, row: &RowView, home: Option<&str>) -> Option<(String, Owner)> {
        // Who owns the row already is the first choice: a quick migration has just brought it there.
        let at_home = home
            .and_then(|node| self.pod_on(node))
            .filter(|pod| !leaving(pod));
        let pod = at_home.or_else(|| self.candidate(None));
        let keep: Vec<_> = pod.into_iter().collect();
        self.delete_other_reservations(&keep);
        let Some(pod) = pod else {
            self.report_unbound(None);
            self.create_reservation(row, Purpose::Current, None, vec![]);
            return None;
        };
        if pod.digest != self.intent.digest {
            // The spec has changed since: the reservation is for another size or place.
            self.report_unbound(None);
            self.delete_reservation(pod, false);
            return None;
        }
        let Some(node) = &pod.node else {
            self.report_unbound(Some(pod));
            if self.is_outdated(pod, None) {
                self.delete_reservation(pod, false);
            }
            return None;
        };
        match self.can_host(node) {
            Ok(owner) => {
                if pod.purpose != Purpose::Current {
                    self.push(Action::PromoteReservation {
                        name: pod.name.clone(),
                        uid: pod.uid.clone(),
                    });
                }
                Some((node.clone(), owner))
            }
            Err(why) => {
                self.ready(Phase::Pending, false, reason::VOLUME_UNAVAILABLE, why);
                if self.another_node_can_host(node) {
                    self.delete_reservation(pod, false);
                }
                self.requeue_soon();
                None
            }
        }
    }

    fn another_node_can_host(&self, node: &str) -> bool {
        self.observed
            .nodes
            .iter()
            .any(|(name, view)| name != node && !view.cordoned && self.can_host(name).is_ok())
    }

    fn acquire(&mut self, row: &RowView, node: String, owner: Owner) {
        self.report_error();
        let change = Change::Acquire {
            vm: self.intent.uid,
            expected_epoch: row.epoch,
            to: owner,
        };
        self.push(Action::Change { via: node, change });
        self.requeue_soon();
    }

    /// Gives the row up. Only while no process and no import of it lives on the node, which its own
    /// volume process checks again.
    pub(super) fn release(&mut self, row: &RowView, node: &str, owner: Owner) {
        self.requeue_soon();
        if self.process_lives_on(node) || self.import_runs_on(node, row) {
            return;
        }
        let change = Change::Release {
            vm: self.intent.uid,
            from: owner,
            epoch: row.epoch,
        };
        self.push(Action::Change {
            via: node.to_owned(),
            change,
        });
    }

    /// Whether a process on `node` runs the guest, or may.
    pub(super) fn process_lives_on(&self, node: &str) -> bool {
        self.observed.processes.iter().any(|process| {
            process.node == node
                && process.alive
                && !matches!(
                    process.status.state,
                    VmState::Departed | VmState::Stopped(_) | VmState::Incoming
                )
        })
    }

    /// The process of the present tenure on `node`.
    pub(super) fn process_of(&self, row: &RowView, node: &str) -> Option<&'a Process> {
        self.observed
            .processes
            .iter()
            .filter(|process| process.node == node)
            .filter(|process| {
                // An incoming process learns its new epoch when it runs.
                process.status.epoch == row.epoch
                    || process.status.epoch.next() == row.epoch
                        && process.status.state == VmState::Incoming
            })
            .max_by_key(|process| (process.alive, process.status.epoch))
    }

    /// If something went wrong lately, that is what people want to read.
    pub(super) fn report_error(&mut self) {
        if let Some((reason, message)) = &self.observed.memory.error {
            self.report.ready.reason = reason;
            self.report.ready.message.clone_from(message);
        }
    }
}
