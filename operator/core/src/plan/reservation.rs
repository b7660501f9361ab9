//! Reservation pods: the nodes on which the scheduler has placed the virtual machine.

use std::time::Duration;

use bascule_crds::names::reason;

use super::context::PlanContext;
use super::place::{COMPLAINTS_MAX, Place};
use super::step::{Ready, Step};
use crate::observed::RowView;
use crate::{Action, Moment, Phase, Pod, PodPhase, Purpose, ReservationRefusal};

impl<'a> PlanContext<'a> {
    /// Pods that are to leave and whose guest has left: their hold processes are ended, so that a
    /// drain goes on. Pods on a node that does not respond are deleted from the API once another node
    /// owns the VM.
    pub(super) fn end_left_reservations(&self, row: &RowView, pods: &[Pod]) -> Step {
        let mut step = Step::new();
        let home = match self.place(row) {
            Place::On { node, .. } => Some(node),
            Place::Nowhere => None,
            Place::UnknownHolder { .. } => return step,
        };
        for pod in pods.iter().filter(|pod| pod.deleting) {
            let Some(node) = &pod.node else { continue };
            let replaced = pods
                .iter()
                .any(|p| p.node == pod.node && p.uid != pod.uid && !leaving(p));
            let may_run = home.as_ref() == Some(node) && self.guest_may_run_on(node, row);
            if (may_run || self.process_lives_on(node)) && !replaced {
                continue;
            }
            if self
                .observed
                .nodes
                .get(node)
                .is_some_and(|n| n.stream == crate::Stream::Up)
            {
                step.append(self.end_reservation(node, pod));
                if self.is_emptied(node, pod) {
                    step.append(self.delete_reservation(pod, true));
                }
            } else if home.is_some() && home.as_ref() != Some(node) {
                step.append(self.delete_reservation(pod, true));
            }
        }
        step
    }

    /// Whether nothing of the pod but its API object matters any more: its hold process was ended, and the scheduler
    /// places no other pod in its room, because the node is cordoned. A drain need not wait then until the kubelet
    /// has noticed the end and taken the pod's network down.
    fn is_emptied(&self, node: &str, pod: &Pod) -> bool {
        let cordoned = self.observed.nodes.get(node).is_some_and(|n| n.cordoned);
        let ended = self.observed.memory.hold_ended.as_ref();
        // Of a pod that has not started, the hold process may still come.
        let started = pod.phase == PodPhase::Running;
        cordoned && started && ended.is_some_and(|(uid, _)| *uid == pod.uid)
    }

    /// Has the pod's hold process ended, unless that was done a moment ago: the kubelet takes its time to delete the pod,
    /// and the node has better things to do then than to search its processes.
    pub(super) fn end_reservation(&self, node: &str, pod: &Pod) -> Step {
        let last = self.observed.memory.hold_ended.as_ref();
        let recent =
            |(uid, at): &(String, Moment)| *uid == pod.uid && self.now.since(*at) < ENDED_AGAIN;
        let mut step = Step::new();
        if !last.is_some_and(recent) {
            step.push(Action::EndReservation {
                node: node.to_owned(),
                pod_uid: pod.uid.clone(),
            });
        }
        step.requeued_soon()
    }

    /// Whether a guest runs, or might be about to, on the node that owns the row.
    fn guest_may_run_on(&self, node: &str, row: &RowView) -> bool {
        let answers = self
            .observed
            .nodes
            .get(node)
            .is_some_and(|n| n.stream == crate::Stream::Up);
        !answers || self.process_lives_on(node) || self.import_runs_on(node, row)
    }

    /// The pod that reserves the guest's resources on `node`.
    pub(super) fn pod_on(&self, node: &str) -> Option<&'a Pod> {
        let mut here: Vec<&Pod> = self
            .pods()
            .iter()
            .filter(|pod| pod.node.as_deref() == Some(node))
            .collect();
        here.sort_by_key(|pod| (leaving(pod), pod.purpose != Purpose::Current, &pod.name));
        here.first().copied()
    }

    /// The pod that a guest which runs nowhere is going to be started by: bound to a node other than
    /// `except` if possible. A migration's pod will do.
    pub(super) fn candidate(&self, except: Option<&str>) -> Option<&'a Pod> {
        let mut pods: Vec<&Pod> = self
            .pods()
            .iter()
            .filter(|pod| !leaving(pod) && (except.is_none() || pod.node.as_deref() != except))
            .collect();
        pods.sort_by_key(|pod| {
            (
                pod.node.is_none(),
                pod.purpose != Purpose::Current,
                &pod.name,
            )
        });
        pods.first().copied()
    }

    /// Whether an unbound pod keeps away from a node that could take the guest by now, and finds no
    /// other.
    pub(super) fn is_outdated(&self, pod: &Pod, except: Option<&str>) -> bool {
        pod.node.is_none()
            && pod.unschedulable.is_some()
            && pod
                .avoid
                .iter()
                .any(|node| Some(node.as_str()) != except && self.can_host(node).is_ok())
    }

    /// Why no pod for this purpose could be created lately.
    pub(super) fn reservation_refusal(&self, purpose: &Purpose) -> Option<&'a ReservationRefusal> {
        let refusal = self.observed.memory.reservation_refusal.as_ref()?;
        let recent = self.now.since(refusal.at) < REFUSAL_HOLDS;
        (refusal.purpose == *purpose && recent).then_some(refusal)
    }

    /// Creates a pod. Operators that see the same pods choose the same name and so create one. A pod
    /// that was refused is requested again every few seconds.
    pub(super) fn create_reservation(
        &self,
        row: &RowView,
        purpose: Purpose,
        pin: Option<String>,
        mut avoid: Vec<String>,
    ) -> Step {
        if let Some(refusal) = self.reservation_refusal(&purpose) {
            let wait = refusal.at.after(REFUSED_AGAIN).since(self.now);
            if !wait.is_zero() {
                let mut step = Step::new();
                step.requeue_within(wait);
                return step;
            }
        }
        if pin.is_none() {
            avoid.extend(self.unsuitable_nodes());
            avoid.sort_unstable();
            avoid.dedup();
        }
        let name = (0..)
            .map(|n: u32| format!("{}-e{}-{n}", self.intent.name, row.epoch))
            .find(|name| !self.is_taken(name))
            .unwrap_or_default();
        Step::action(Action::CreateReservation {
            name,
            purpose,
            pin,
            avoid,
        })
        .requeued_soon()
    }

    fn is_taken(&self, name: &str) -> bool {
        let foreign = &self.observed.foreign_pods;
        self.pods().iter().any(|pod| pod.name == name) || foreign.iter().any(|pod| pod.name == name)
    }

    /// Deletes pods that only claim to be reservations. The record of one that an operator has just made
    /// may be on its way.
    pub(super) fn remove_foreign_pods(&self) -> Step {
        let mut step = Step::new();
        for pod in self.observed.foreign_pods.iter().filter(|p| !p.deleting) {
            let wait = pod.created.after(RECORD_PATIENCE).since(self.now);
            if !wait.is_zero() {
                step.requeue_within(wait);
                continue;
            }
            let message = format!(
                "deleting pod {}: it is no reservation of this operator",
                pod.name
            );
            step.event(reason::FOREIGN_RESERVATION, true, message);
            step.push(Action::DeleteReservation {
                name: pod.name.clone(),
                uid: pod.uid.clone(),
                force: true,
            });
        }
        step
    }

    /// Does nothing to a pod that is being deleted already, unless by `force`.
    pub(super) fn delete_reservation(&self, pod: &Pod, force: bool) -> Step {
        if pod.deleting && !force {
            return Step::new();
        }
        Step::action(Action::DeleteReservation {
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            force,
        })
        .requeued_soon()
    }

    /// Deletes every pod but those that `keep` names.
    pub(super) fn delete_other_reservations(&self, keep: &[&Pod]) -> Step {
        let mut step = Step::new();
        for pod in self.pods() {
            if keep.iter().all(|kept| kept.uid != pod.uid) {
                step.append(self.delete_reservation(pod, false));
            }
        }
        step
    }

    /// The Ready condition while the pod is not bound.
    pub(super) fn unbound(&self, pod: Option<&Pod>) -> Ready {
        let refusal = self.reservation_refusal(&Purpose::Current);
        if let (None, Some(refusal)) = (pod, refusal) {
            return Ready::new(Phase::Pending, false, refusal.reason, &refusal.message);
        }
        match pod.and_then(|pod| pod.unschedulable.as_ref()) {
            Some(why) => {
                let mut message = format!("no node has room or fits the placement: {why}");
                for why in self.ruled_out(pod) {
                    message = format!("{message} {why}.");
                }
                Ready::new(Phase::Pending, false, reason::UNSCHEDULABLE, message)
            }
            None => {
                let message = "waiting for the scheduler to choose a node";
                Ready::new(Phase::Pending, false, reason::SCHEDULING, message)
            }
        }
    }

    /// Why the nodes that the pod's affinity excludes cannot take the guest: the scheduler's message
    /// only counts them.
    fn ruled_out(&self, pod: Option<&Pod>) -> Vec<String> {
        let avoided = pod.map_or(&[][..], |pod| &pod.avoid);
        let known = avoided
            .iter()
            .filter(|name| self.observed.nodes.contains_key(*name));
        known
            .filter_map(|name| self.can_host(name).err())
            .take(COMPLAINTS_MAX)
            .collect()
    }

    /// Creates the reservation pod of a running guest again, pinned to the guest's node, when it was
    /// lost.
    pub(super) fn ensure_reservation(&self, row: &RowView, node: &str) -> Step {
        let mut step = Step::new();
        let again =
            || self.create_reservation(row, Purpose::Current, Some(node.to_owned()), vec![]);
        match self.pod_on(node) {
            None => {
                let lost = format!("the reservation on {node} is gone; making it again there");
                step.append(self.lost(lost));
                step.append(again());
            }
            Some(pod) if pod.phase == PodPhase::Failed => {
                // A failed pod keeps its name and holds nothing: a new one takes its place.
                step.append(self.delete_reservation(pod, true));
                let waiting = self.pods().iter().any(|p| p.node.is_none() && !leaving(p));
                if !waiting {
                    let failed = format!("the reservation on {node} failed; making it again there");
                    step.append(self.lost(failed));
                    step.append(again());
                }
            }
            Some(_) => {}
        }
        step
    }

    /// One event for each loss, not for each request while the new pod is refused.
    fn lost(&self, message: String) -> Step {
        let mut step = Step::new();
        if self.reservation_refusal(&Purpose::Current).is_none() {
            step.event(reason::RESERVATION_LOST, true, message);
        }
        step
    }
}

/// Labels and annotations that have changed since the pods were made. The last actions of a plan:
/// nothing waits for them.
pub(super) fn update_reservations(pods: &[Pod]) -> Step {
    let mut step = Step::new();
    for pod in pods.iter().filter(|p| !p.copies_current && !leaving(p)) {
        step.push(Action::UpdateReservation {
            name: pod.name.clone(),
            uid: pod.uid.clone(),
        });
    }
    step
}

/// Longer than an operator takes to write the record of a pod that it has made, and its successor to read it.
const RECORD_PATIENCE: Duration = Duration::from_secs(60);
/// A hold process ends within milliseconds; one that had not started yet is ended then.
const ENDED_AGAIN: Duration = Duration::from_secs(3);
/// Interval between two requests for a pod that is refused.
const REFUSED_AGAIN: Duration = Duration::from_secs(5);
/// How long after the last request a refusal is reported: longer than until the next request.
const REFUSAL_HOLDS: Duration = Duration::from_secs(30);

/// Whether a pod is on its way out, or was thrown out.
pub(super) const fn leaving(pod: &Pod) -> bool {
    pod.deleting
        || pod.leaving_since.is_some()
        || matches!(pod.phase, PodPhase::Failed | PodPhase::Evicted)
}
