//! The owner's node responds neither on the network nor on the volume: request a takeover, which
//! needs a fence proof, and start the guest on another node.
//!
//! The operator only requests it. The volume's coordinator grants a takeover when it has a proof from its
//! own reads, or a manual fencing confirmation; until then the request is repeated every second.

use bascule_crds::names::{ANNOTATION_CONFIRM_FENCED, reason};
use bascule_types::{Change, Epoch, FenceProof, MissingProof, Owner, Refusal};

use super::context::PlanContext;
use super::place::Place;
use super::step::{Ready, ReportChange, Step};
use crate::action::FailoverUpdate;
use crate::observed::RowView;
use crate::{Action, Fact, FailoverView, FailurePolicy, NodeHealth, Phase, Purpose};

impl PlanContext<'_> {
    pub(super) fn failover(&self, row: &RowView, node: &str, owner: Owner) -> Step {
        let mut step = Step::new().requeued_soon();
        if self.intent.on_failure == FailurePolicy::Leave {
            let message = format!("{node} does not respond; availability.onNodeFailure is Leave");
            let leave = Ready::new(Phase::Unknown, false, reason::NODE_SUSPECT, message);
            return step.with_ready(leave);
        }
        let (reason, missing) = self.missing_proof(node, owner);
        step.append(self.record_suspicion(row.epoch, node, owner, &missing));
        let waiting = |reason, message| Ready::new(Phase::FailingOver, false, reason, message);
        let Some(pod) = self.candidate(Some(node)) else {
            let avoid = vec![node.to_owned()];
            step.append(self.create_reservation(row, Purpose::Current, None, avoid));
            return step.with_ready(match self.reservation_refusal(&Purpose::Current) {
                Some(refusal) => waiting(
                    refusal.reason,
                    format!("{node} does not respond; {}", refusal.message),
                ),
                None => waiting(reason, missing),
            });
        };
        let Some(target) = &pod.node else {
            if self.is_outdated(pod, Some(node)) {
                step.append(self.delete_reservation(pod, false));
            }
            return step.with_ready(match &pod.unschedulable {
                Some(why) => waiting(
                    reason::UNSCHEDULABLE,
                    format!("{node} does not respond; no other node has room: {why}"),
                ),
                None => waiting(reason, missing),
            });
        };
        match self.can_host(target) {
            Ok(to) => {
                let change = Change::TakeOver {
                    vm: self.intent.uid,
                    from: owner,
                    epoch: row.epoch,
                    to,
                };
                step.push(Action::Change {
                    via: target.clone(),
                    change,
                });
                step.with_ready(waiting(reason, missing))
            }
            Err(why) => {
                step.append(self.delete_reservation(pod, false));
                step.with_ready(waiting(reason, format!("{node} does not respond; {why}")))
            }
        }
    }

    /// The coordinator is lost, and the last owner's node with it, or the same node: the outage is recorded while
    /// the others elect a coordinator. What the volume said last may be out of date, so nothing is requested. With a
    /// migration under way it says too little even for the record.
    pub(super) fn suspect_last_owner(&self) -> Option<Step> {
        let (owner, epoch) = self.observed.last_owner?;
        let row = RowView {
            owner: Some(owner),
            epoch,
            ..RowView::default()
        };
        let Place::On { node, health, .. } = self.place(&row) else {
            return None;
        };
        let migrations = self.observed.migrations.known()?;
        if health != NodeHealth::Suspect
            || self.intent.on_failure == FailurePolicy::Leave
            || migrations.iter().any(|m| !m.phase.is_final())
        {
            return None;
        }
        let waits_for =
            format!("{node} does not respond; the volume has no coordinator at the moment");
        let mut step = Step::new().requeued_soon();
        step.append(self.record_suspicion(epoch, &node, owner, &waits_for));
        step.change(ReportChange::Node(Some(node)));
        let waiting = Ready::new(Phase::FailingOver, false, reason::NODE_SUSPECT, waits_for);
        Some(step.with_ready(waiting))
    }

    /// Every outage of a node has a record of its own: a node that came back in time and stops
    /// responding once more in the same epoch gets a second one.
    fn record_suspicion(&self, epoch: Epoch, node: &str, owner: Owner, waits_for: &str) -> Step {
        let Fact::Known(records) = &self.observed.failovers else {
            return Step::new();
        };
        let of_this = |record: &&FailoverView| record.epoch == epoch && record.owner == owner;
        if let Some(open) = open(records).find(of_this) {
            let update = FailoverUpdate::Suspected {
                message: waits_for.to_owned(),
            };
            return Step::action(Action::ReportFailover {
                name: open.name.clone(),
                update,
            });
        }
        let mut step = Step::new();
        let suspect = format!(
            "{node} does not respond on the network, and its heartbeat on the volume has stopped"
        );
        step.event(reason::NODE_SUSPECT, true, suspect);
        step.push(Action::CreateFailover {
            name: next_name(&self.intent.name, epoch, records),
            node: node.to_owned(),
            owner,
            epoch,
        });
        step
    }

    /// The reason and message of what the takeover waits for.
    fn missing_proof(&self, node: &str, owner: Owner) -> (&'static str, String) {
        match &self.observed.memory.takeover_refusal {
            Some(Refusal::NotFenced { missing, .. }) => match missing {
                MissingProof::AdminConfirmation | MissingProof::NoWatchdog => (
                    reason::WAITING_FOR_CONFIRMATION,
                    format!(
                        "{node} does not respond: {missing}. Make sure that it is off, then run \
                         kubectl annotate --overwrite sv {} {ANNOTATION_CONFIRM_FENCED}={node}/{}/{}",
                        self.intent.volume, owner.slot, owner.generation
                    ),
                ),
                _ => (
                    reason::NODE_SUSPECT,
                    format!("{node} does not respond; no fence proof yet: {missing}"),
                ),
            },
            Some(refusal) => (
                reason::NODE_SUSPECT,
                format!("{node} does not respond; the volume says: {refusal}"),
            ),
            None => (
                reason::NODE_SUSPECT,
                format!("{node} does not respond; takeover requested"),
            ),
        }
    }

    /// Updates the open Failover records from the volume's ownership record.
    pub(super) fn follow_failovers(&self, row: &RowView) -> Step {
        let mut step = Step::new();
        let records = self.observed.failovers.known();
        let place = match self.place(row) {
            Place::On { node, health, .. } => Some((node, health)),
            _ => None,
        };
        for record in open(records.map_or(&[][..], Vec::as_slice)) {
            // An owner that began another epoch by itself was not taken over: it was fenced in none.
            if row.epoch == record.epoch || row.owner == Some(record.owner) {
                let healthy = place
                    .as_ref()
                    .is_some_and(|(_, v)| *v == NodeHealth::Healthy);
                step.append(withdraw(record, row.owner, healthy));
            } else if let Some((target, _)) = &place {
                let fence = row.fences.iter().find(|f| f.victim == record.owner);
                let proof = fence.map(|f| f.proof);
                step.append(self.report_takeover(row, target.clone(), record, proof));
            }
        }
        step
    }

    fn report_takeover(
        &self,
        row: &RowView,
        target: String,
        record: &FailoverView,
        proof: Option<FenceProof>,
    ) -> Step {
        let mut step = Step::new();
        let runs = self.process_of(row, &target).is_some_and(|process| {
            process.alive && process.status.state == bascule_ipc::vm::VmState::Running
        });
        if !record.taken_over {
            let message = format!("taken over by {target} in epoch {}", row.epoch);
            step.event(reason::TAKEN_OVER, true, message);
            let update = FailoverUpdate::TakenOver {
                target: target.clone(),
                epoch: row.epoch,
                proof,
            };
            step.push(Action::ReportFailover {
                name: record.name.clone(),
                update,
            });
        }
        if runs {
            let update = FailoverUpdate::Succeeded {
                target,
                epoch: row.epoch,
                proof,
            };
            step.push(Action::ReportFailover {
                name: record.name.clone(),
                update,
            });
        }
        step
    }
}

/// Closes the record of an outage that ended before the volume granted a takeover.
fn withdraw(record: &FailoverView, owner: Option<Owner>, healthy: bool) -> Step {
    let node = &record.node;
    let message = match owner {
        Some(owner) if owner == record.owner && !healthy => return Step::new(),
        // After its lease had run out it came back in the next generation of its slot.
        Some(owner) if owner.slot == record.owner.slot => {
            format!("{node} came back before anything was taken from it")
        }
        Some(_) | None => format!("{node} gave the virtual machine up by itself"),
    };
    Step::action(Action::ReportFailover {
        name: record.name.clone(),
        update: FailoverUpdate::Withdrawn { message },
    })
}

/// The records that have not come to their end.
fn open(records: &[FailoverView]) -> impl Iterator<Item = &FailoverView> {
    records.iter().filter(|record| !record.closed)
}

/// The name of an epoch's next record: `web-5`, and after that `web-5.2`. Operators that see the same
/// records choose the same name and so create one object; and a name of a virtual machine has
/// no dot in it, so that no two of them choose the same.
fn next_name(vm: &str, epoch: Epoch, records: &[FailoverView]) -> String {
    let first = format!("{vm}-{epoch}");
    let ordinal = |record: &FailoverView| match record.name.strip_prefix(&first)? {
        "" => Some(1),
        rest => rest.strip_prefix('.')?.parse::<u64>().ok(),
    };
    match records.iter().filter_map(ordinal).max() {
        None => first,
        Some(last) => format!("{first}.{}", last.saturating_add(1)),
    }
}
