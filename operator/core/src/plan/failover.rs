//! The owner's node is silent both ways: obtain a proof, take the row, start elsewhere.
//!
//! The operator only asks. The volume's coordinator grants a takeover when it has a proof from its
//! own reads, or an administrator's word; until then it is asked once a second.

use bascule_api::names::{ANNOTATION_CONFIRM_FENCED, reason};
use bascule_types::Owner;
use bascule_volume_format::change::{Change, FenceProof, MissingProof, Refusal};

use super::Planner;
use crate::action::FailoverUpdate;
use crate::observed::RowView;
use crate::{Action, Fact, FailurePolicy, Phase, Purpose};

impl Planner<'_> {
    pub(super) fn failover(&mut self, row: &RowView, node: &str, owner: Owner) {
        self.soon();
        if self.intent.on_failure == FailurePolicy::Leave {
            let message = format!("{node} is silent; availability.onNodeFailure is Leave");
            return self.ready(Phase::Unknown, false, reason::NODE_SUSPECT, message);
        }
        let waiting = self.missing_proof(node, owner);
        let name = format!("{}-{}", self.intent.name, row.epoch);
        match &self.observed.failover {
            Fact::Unknown => {}
            Fact::Known(open) if open.epoch == row.epoch => {
                let update = FailoverUpdate::Suspected {
                    message: waiting.1.clone(),
                };
                self.push(Action::ReportFailover {
                    name: open.name.clone(),
                    update,
                });
            }
            Fact::Absent | Fact::Known(_) => {
                let suspect = format!("{node} is silent on the network and on the volume");
                self.event(reason::NODE_SUSPECT, true, suspect);
                self.push(Action::CreateFailover {
                    name,
                    node: node.to_owned(),
                    owner,
                    epoch: row.epoch,
                });
            }
        }
        self.ready(Phase::FailingOver, false, waiting.0, waiting.1);
        let Some(pod) = self.candidate(Some(node)) else {
            return self.create_reservation(row, Purpose::Current, None, vec![node.to_owned()]);
        };
        let Some(target) = &pod.node else {
            if let Some(why) = &pod.unschedulable {
                let message = format!("{node} is silent; no other node has room: {why}");
                self.ready(Phase::FailingOver, false, reason::UNSCHEDULABLE, message);
            }
            if self.is_outdated(pod, Some(node)) {
                self.delete_reservation(pod, false);
            }
            return;
        };
        match self.usable(target) {
            Ok(to) => {
                let change = Change::TakeOver {
                    vm: self.intent.uid,
                    from: owner,
                    epoch: row.epoch,
                    to,
                };
                self.push(Action::Change {
                    via: target.clone(),
                    change,
                });
            }
            Err(why) => {
                self.report.ready.message = format!("{node} is silent; {why}");
                self.delete_reservation(pod, false);
            }
        }
    }

    /// What the takeover waits for, in words.
    fn missing_proof(&self, node: &str, owner: Owner) -> (&'static str, String) {
        match &self.observed.history.takeover_refusal {
            Some(Refusal::NotFenced { missing, .. }) => match missing {
                MissingProof::AdministratorsWord | MissingProof::NoWatchdog => (
                    reason::WAITING_FOR_CONFIRMATION,
                    format!(
                        "{node} is silent: {missing}. Make sure that it is off, then run \
                         kubectl annotate --overwrite sv {} {ANNOTATION_CONFIRM_FENCED}={node}/{}/{}",
                        self.intent.volume, owner.slot, owner.generation
                    ),
                ),
                _ => (
                    reason::NODE_SUSPECT,
                    format!("{node} is silent; no proof yet: {missing}"),
                ),
            },
            Some(refusal) => (
                reason::NODE_SUSPECT,
                format!("{node} is silent; the volume says: {refusal}"),
            ),
            None => (
                reason::NODE_SUSPECT,
                format!("{node} is silent; asking the volume"),
            ),
        }
    }

    /// Keeps an open record in step with what became of the virtual machine.
    pub(super) fn follow_failover(&mut self, row: &RowView) {
        let Fact::Known(open) = &self.observed.failover else {
            return;
        };
        let place = match self.place(row) {
            super::place::Place::On { node, verdict, .. } => Some((node, verdict)),
            _ => None,
        };
        if row.epoch == open.epoch {
            let returned = place
                .as_ref()
                .is_some_and(|(_, v)| *v == crate::Verdict::Healthy);
            if row.owner != Some(open.owner) || returned {
                let message = if returned {
                    format!("{} came back before anything was taken from it", open.node)
                } else {
                    format!("{} gave the virtual machine up by itself", open.node)
                };
                let update = FailoverUpdate::Withdrawn { message };
                self.push(Action::ReportFailover {
                    name: open.name.clone(),
                    update,
                });
            }
            return;
        }
        let proof = row
            .fences
            .iter()
            .find(|f| f.victim == open.owner)
            .map(|f| f.proof);
        let Some((target, _)) = place else { return };
        self.report_takeover(row, target, &open.name, open.taken_over, proof);
    }

    fn report_takeover(
        &mut self,
        row: &RowView,
        target: String,
        record: &str,
        known: bool,
        proof: Option<FenceProof>,
    ) {
        let runs = self.process_of(row, &target).is_some_and(|process| {
            process.alive && process.status.state == bascule_ipc::vm::VmState::Running
        });
        if !known {
            let message = format!("taken over by {target} in epoch {}", row.epoch);
            self.event(reason::TAKEN_OVER, true, message);
            let update = FailoverUpdate::TakenOver {
                target: target.clone(),
                epoch: row.epoch,
                proof,
            };
            self.push(Action::ReportFailover {
                name: record.to_owned(),
                update,
            });
        }
        if runs {
            let update = FailoverUpdate::Succeeded {
                target,
                epoch: row.epoch,
                proof,
            };
            self.push(Action::ReportFailover {
                name: record.to_owned(),
                update,
            });
        }
    }
}
