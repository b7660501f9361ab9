//! A virtual machine whose guest does not run: start it, or leave it stopped.

use bascule_crds::names::reason;
use bascule_ipc::vm::{StopReason, VmState};
use bascule_types::{Change, Owner, Ownership};

use super::context::PlanContext;
use super::initial_status::completed_before;
use super::reservation::leaving;
use super::step::{Ready, ReportChange, Step};
use crate::observed::{RowView, SavedView};
use crate::{Action, Phase, Process, Purpose, RunPolicy, Stream};

/// What the processes that have ended mean for the next start.
struct Ended {
    step: Step,
    /// Why the guest may not be started now; none if it may.
    blocked: Option<Ready>,
    /// Whether the guest shut itself down and its run policy leaves it down.
    completed: bool,
}

impl<'a> PlanContext<'a> {
    /// No node owns the virtual machine.
    pub(super) fn unowned(&self, row: &'a RowView) -> Step {
        let mut step = Step::new();
        step.change(ReportChange::RestartRequired(Some(false)));
        step.append(self.refuse_migrations(row));
        let ended = self.ended_processes(row);
        step.append(ended.step);
        if !self.wanted(ended.completed) {
            step.append(self.stay_stopped(row, ended.completed));
            return step;
        }
        if let Some(blocked) = ended.blocked {
            return step.with_ready(blocked);
        }
        let (chosen, place) = self.startable_place(row, None);
        step.append(chosen);
        if let Some((node, owner)) = place {
            step.change(ReportChange::Node(Some(node.clone())));
            let ready = self.or_last_error(starting(&node));
            step.append(self.acquire(row, node, owner));
            step = step.with_ready(ready);
        }
        step
    }

    /// A healthy node owns the virtual machine, and no guest runs there.
    pub(super) fn idle(&self, row: &RowView, node: &str, owner: Owner) -> Step {
        let mut step = Step::new();
        step.change(ReportChange::RestartRequired(Some(false)));
        step.append(self.refuse_migrations(row));
        if self.ran_before(row, node) {
            step.append(self.release(row, node, owner));
            let message = format!("waiting until the writes of its process on {node} are complete");
            let waiting = Ready::new(Phase::Starting, false, reason::STARTING, message);
            return step.with_ready(self.or_last_error(waiting));
        }
        let ended = self.ended_processes(row);
        step.append(ended.step);
        if !self.imported(row) {
            step.append(self.import(row, node, owner));
            return step;
        }
        if !self.wanted(ended.completed) {
            step.append(self.release(row, node, owner));
            let message = "stopped, as spec.runPolicy requires";
            return step.with_ready(Ready::new(Phase::Stopped, true, reason::STOPPED, message));
        }
        if let Some(blocked) = ended.blocked {
            return step.with_ready(blocked);
        }
        let (chosen, place) = self.startable_place(row, Some(node));
        step.append(chosen);
        let Some((place, _)) = place else {
            return step;
        };
        let saved = row.saved;
        // Complete, but saved for the next epoch: its process ended between the end of saving and the
        // transfer of the ownership.
        let saved_for_next = saved.is_some_and(|saved| saved.is_restorable(row.epoch.next()));
        if place != node || saved_for_next {
            step.append(self.release(row, node, owner));
            return step.with_ready(starting(&place));
        }
        let restore = saved.is_some_and(|saved| saved.is_restorable(row.epoch));
        if let Some(saved) = saved.filter(|_| !restore) {
            step.append(self.drop_saved(node, Ownership::new(owner, row.epoch), saved));
        }
        step.change(ReportChange::StoppingSince(None));
        let ready = self.or_last_error(starting(&place));
        step.push(Action::StartVm {
            node: place,
            owner,
            epoch: row.epoch,
            restore,
        });
        step.requeued_soon().with_ready(ready)
    }

    /// Whether the guest ran in the row's epoch and its process has ended. It starts again in the next
    /// epoch, which the volume begins when every write of that process is complete. One that was to restore
    /// the guest, and whose saved state is still there, did not run it.
    fn ran_before(&self, row: &RowView, node: &str) -> bool {
        let restores = row
            .saved
            .is_some_and(|saved| saved.is_restorable(row.epoch));
        let mut here = self.observed.processes.iter().filter(|p| p.node == node);
        !restores
            && here.any(|process| {
                let status = &process.status;
                let ran = !matches!(status.state, VmState::Incoming | VmState::Departed);
                let ended = !process.alive || matches!(status.state, VmState::Stopped(_));
                status.epoch == row.epoch && ran && ended
            })
    }

    /// Frees the space of a saved state that no epoch may restore any more.
    fn drop_saved(&self, node: &str, by: Ownership, saved: SavedView) -> Step {
        let mut step = Step::new();
        if saved.complete {
            let message = "its saved memory is older than its last owner; it boots from its disks";
            step.event(reason::SAVED_STATE_OUTDATED, true, message);
        }
        let change = Change::DropSavedState {
            vm: self.intent.uid,
            from: by.owner,
            epoch: by.epoch,
        };
        step.push(Action::Change {
            via: node.to_owned(),
            change,
        });
        step
    }

    /// Whether the guest should run.
    fn wanted(&self, completed: bool) -> bool {
        match self.intent.run {
            // In a namespace that is being deleted, the pods go first and the object only after them.
            _ if self.observed.memory.namespace_ending => false,
            RunPolicy::Always => true,
            RunPolicy::OnFailure => !completed,
            RunPolicy::Stopped => false,
        }
    }

    fn stay_stopped(&self, row: &RowView, completed: bool) -> Step {
        let mut step = Step::new();
        step.change(ReportChange::StoppingSince(None));
        step.change(ReportChange::Node(None));
        step.append(self.delete_other_reservations(&[]));
        if self.imported(row) {
            let (reason, message) = if completed {
                (reason::GUEST_SHUT_DOWN, "the guest shut itself down")
            } else {
                (reason::STOPPED, "stopped, as spec.runPolicy requires")
            };
            return step.with_ready(Ready::new(Phase::Stopped, true, reason, message));
        }
        let message = "images are being copied";
        let importing = Ready::new(Phase::Importing, false, reason::IMPORTING, message);
        let importer = self
            .route()
            .and_then(|node| self.can_host(&node).ok().map(|o| (node, o)));
        let Some((node, owner)) = importer else {
            return step.with_ready(importing);
        };
        step.append(self.acquire(row, node, owner));
        step.with_ready(self.or_last_error(importing))
    }

    /// Collects processes that have ended, and accounts for restarts: a guest that ended by itself is
    /// collected only when its restart budget allows another start.
    fn ended_processes(&self, row: &RowView) -> Ended {
        let mut all = Ended {
            step: Step::new(),
            blocked: None,
            completed: completed_before(self.intent, self.observed),
        };
        for process in &self.observed.processes {
            let node = self.observed.nodes.get(&process.node);
            if node.is_none_or(|node| node.stream != Stream::Up) {
                continue;
            }
            let ended = match &process.status.state {
                VmState::Departed if is_still_asked(row, process) => !process.alive,
                VmState::Departed => process.status.epoch < row.epoch || !process.alive,
                // The migration of an earlier epoch that it was built for can no longer arrive.
                VmState::Incoming => process.status.epoch < row.epoch,
                VmState::Stopped(_) => true,
                _ => !process.alive,
            };
            if !ended {
                continue;
            }
            if process.status.epoch == row.epoch {
                let one = self.may_restart(process, all.completed);
                all.step.append(one.step);
                all.completed = one.completed;
                if one.blocked.is_some() {
                    all.blocked = one.blocked;
                    continue;
                }
            }
            all.step.push(Action::CollectVm {
                node: process.node.clone(),
                pid: process.status.pid,
            });
            all.step.requeue_soon();
        }
        all
    }

    /// Whether a guest that ended in the present epoch may be started again now.
    fn may_restart(&self, process: &Process, completed: bool) -> Ended {
        let mut ended = Ended {
            step: Step::new(),
            blocked: None,
            completed,
        };
        let requested = self.observed.memory.stopping_since.is_some();
        let why = match &process.status.state {
            VmState::Stopped(StopReason::GuestReset) | VmState::Departed | VmState::Incoming => {
                return ended;
            }
            VmState::Stopped(StopReason::Requested) => "it was stopped on request".to_owned(),
            VmState::Stopped(StopReason::GuestShutdown) => "the guest shut itself down".to_owned(),
            VmState::Stopped(StopReason::GuestFault { what } | StopReason::Failed { what }) => {
                what.clone()
            }
            _ => format!("its process on {} ended unexpectedly", process.node),
        };
        ended.step.change(ReportChange::StopReason(why.clone()));
        match &process.status.state {
            VmState::Stopped(StopReason::Requested) => return ended,
            VmState::Stopped(StopReason::GuestShutdown)
                if !requested && self.intent.run == RunPolicy::OnFailure =>
            {
                ended.step.change(ReportChange::Completed);
                ended.completed = true;
                return ended;
            }
            _ => {}
        }
        if requested || !self.wanted(completed) {
            return ended;
        }
        self.within_restart_budget(ended, &why)
    }

    fn within_restart_budget(&self, mut ended: Ended, why: &str) -> Ended {
        let budget = &self.intent.restart;
        let restarts = budget.recent(&self.observed.memory.restarts, self.now);
        match budget.next(&restarts, self.now) {
            Some(at) if at <= self.now => {
                ended.step.change(ReportChange::Restarted(self.now));
                let message = format!("restarting: {why}");
                ended.step.event(reason::GUEST_FAILED, true, message);
            }
            Some(at) => {
                let wait = at.since(self.now);
                let message = format!("{why}; restarting in {} s", wait.as_secs() + 1);
                ended.step.requeue_within(wait);
                ended.blocked = Some(Ready::new(
                    Phase::Failed,
                    false,
                    reason::BACKING_OFF,
                    message,
                ));
            }
            None => {
                let message = format!("{why}; restarted {} times already", restarts.len());
                ended.blocked = Some(Ready::new(
                    Phase::Failed,
                    false,
                    reason::RESTARTS_EXHAUSTED,
                    message,
                ));
            }
        }
        ended
    }

    /// The node of a reservation on which the guest can be started now. Without one, the step creates a
    /// reservation where there is none, and its Ready condition says what is missing.
    fn startable_place(
        &self,
        row: &RowView,
        home: Option<&str>,
    ) -> (Step, Option<(String, Owner)>) {
        // The owner's node comes first: a quick migration has just brought the guest there.
        let at_home = home
            .and_then(|node| self.pod_on(node))
            .filter(|pod| !leaving(pod));
        let pod = at_home.or_else(|| self.candidate(None));
        let keep: Vec<_> = pod.into_iter().collect();
        let mut step = self.delete_other_reservations(&keep);
        let Some(pod) = pod else {
            step.append(self.create_reservation(row, Purpose::Current, None, vec![]));
            return (step.with_ready(self.unbound(None)), None);
        };
        if pod.digest != self.intent.digest {
            // The spec has changed since: the reservation is for another size or place.
            step.append(self.delete_reservation(pod, false));
            return (step.with_ready(self.unbound(None)), None);
        }
        let Some(node) = &pod.node else {
            if self.is_outdated(pod, None) {
                step.append(self.delete_reservation(pod, false));
            }
            return (step.with_ready(self.unbound(Some(pod))), None);
        };
        match self.can_host(node) {
            Ok(owner) => {
                if pod.purpose != Purpose::Current {
                    step.push(Action::PromoteReservation {
                        name: pod.name.clone(),
                        uid: pod.uid.clone(),
                    });
                }
                (step, Some((node.clone(), owner)))
            }
            Err(why) => {
                if self.another_node_can_host(node) {
                    step.append(self.delete_reservation(pod, false));
                }
                let ready = Ready::new(Phase::Pending, false, reason::VOLUME_UNAVAILABLE, why);
                (step.requeued_soon().with_ready(ready), None)
            }
        }
    }

    fn another_node_can_host(&self, node: &str) -> bool {
        self.observed
            .nodes
            .iter()
            .any(|(name, view)| name != node && !view.cordoned && self.can_host(name).is_ok())
    }

    fn acquire(&self, row: &RowView, node: String, owner: Owner) -> Step {
        let change = Change::Acquire {
            vm: self.intent.uid,
            expected_epoch: row.epoch,
            to: owner,
        };
        Step::action(Action::Change { via: node, change }).requeued_soon()
    }

    /// Gives the ownership up, but only while no process and no import of the virtual machine is left
    /// on the node, which that node's volume process checks again.
    pub(super) fn release(&self, row: &RowView, node: &str, owner: Owner) -> Step {
        let mut step = Step::new().requeued_soon();
        if self.process_lives_on(node) || self.import_runs_on(node, row) {
            return step;
        }
        let change = Change::Release {
            vm: self.intent.uid,
            from: owner,
            epoch: row.epoch,
        };
        step.push(Action::Change {
            via: node.to_owned(),
            change,
        });
        step
    }
}

/// Whether the process has saved the state that the guest is about to be restored from: its node knows the
/// spec that it had.
fn is_still_asked(row: &RowView, process: &Process) -> bool {
    row.saved
        .is_some_and(|saved| saved.is_restorable(row.epoch) && saved.epoch == process.status.epoch)
}

fn starting(node: &str) -> Ready {
    let message = format!("starting on {node}");
    Ready::new(Phase::Starting, false, reason::STARTING, message)
}
