//! Actions that are calls to the Kubernetes API.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use bascule_crds::names::{LABEL_PURPOSE, LABEL_TRIGGER, LABEL_VM, TRIGGER_DRAIN, VM_FINALIZER};
use bascule_crds::{
    Failover, FailoverSpec, VirtualMachine, VirtualMachineMigration, VirtualMachineMigrationSpec,
};
use bascule_node_api::command::VmSpec;
use bascule_operator_core::{
    Action, MigrationMode, Purpose, ReservationRecord, ReservationRefusal, SpecDigest,
};
use bascule_types::{Epoch, Owner};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::events::{Event, EventType};
use kube::{Api, Resource, ResourceExt};
use serde_json::json;

use crate::copied_metadata;
use crate::execute::execution::{Execution, Refused};
use crate::kube_api::{
    api_owner, creation_refusal, ignore_already_exists, ignore_not_found, is_namespace_terminating,
};
use crate::reservation_pod::{self, Reservation};

impl Execution<'_> {
    pub(super) async fn set_finalizer(&self, wanted: bool) -> Result<()> {
        let mut finalizers = self.vm.finalizers().to_vec();
        finalizers.retain(|finalizer| finalizer != VM_FINALIZER);
        if wanted {
            finalizers.push(VM_FINALIZER.to_owned());
        }
        // The resource version makes this fail with 409 if the finalizers were changed since the read.
        let patch = json!({"metadata": {
            "finalizers": finalizers,
            "resourceVersion": self.vm.resource_version(),
        }});
        let api: Api<VirtualMachine> = self.namespaced();
        let params = PatchParams::default();
        let outcome = api
            .patch(&self.intent.name, &params, &Patch::Merge(&patch))
            .await;
        ignore_not_found(outcome)
    }

    pub(super) async fn execute_reservation(&mut self, action: &Action) -> Result<()> {
        let api: Api<Pod> = self.namespaced();
        match action {
            Action::CreateReservation {
                name,
                purpose,
                pin,
                avoid,
            } => {
                let pin = pin.as_deref();
                self.create_reservation(name, purpose, pin, avoid).await
            }
            Action::DeleteReservation { name, uid, force } => {
                let mut params = DeleteParams::default().preconditions(Preconditions {
                    uid: Some(uid.clone()),
                    resource_version: None,
                });
                if *force {
                    params = params.grace_period(0);
                }
                ignore_not_found(api.delete(name, &params).await)
            }
            Action::PromoteReservation { name, uid } => {
                for record in &mut self.memory.reservations {
                    if record.uid == *uid {
                        record.purpose = Purpose::Current;
                    }
                }
                let patch = json!({"metadata": {
                    "uid": uid,
                    "labels": {LABEL_PURPOSE: reservation_pod::CURRENT},
                }});
                let params = PatchParams::default();
                ignore_not_found(api.patch(name, &params, &Patch::Merge(&patch)).await)
            }
            Action::UpdateReservation { name, uid } => {
                let pods = &self.context.stores.pods;
                let Some(pod) = pods.find(|pod| pod.metadata.uid.as_ref() == Some(uid)) else {
                    return Ok(());
                };
                let patch = copied_metadata::patch(self.vm, &pod)?;
                let params = PatchParams::default();
                ignore_not_found(api.patch(name, &params, &Patch::Merge(&patch)).await)
            }
            _ => Ok(()),
        }
    }

    /// Remembers what the API server said to a reservation pod, for the conditions of the VM and of
    /// its migration. One event for each different refusal.
    async fn reservation_answered(
        &mut self,
        purpose: &Purpose,
        error: Option<&kube::Error>,
    ) -> Result<()> {
        let Some(error) = error else {
            self.memory.reservation_refusal = None;
            return Ok(());
        };
        if is_namespace_terminating(error) {
            return Ok(());
        }
        let Some((reason, message)) = creation_refusal(error) else {
            return Ok(());
        };
        let message = format!("the reservation pod is refused: {message}");
        let refusal = ReservationRefusal {
            purpose: purpose.clone(),
            at: self.now,
            reason,
            message: message.clone(),
        };
        let before = self.memory.reservation_refusal.replace(refusal);
        if before.is_none_or(|before| before.reason != reason || before.purpose != *purpose) {
            self.publish_event(reason, &message, true).await;
        }
        Err(Refused(message).into())
    }

    /// Makes the pod and remembers that it is the operator's.
    async fn create_reservation(
        &mut self,
        name: &str,
        purpose: &Purpose,
        pin: Option<&str>,
        avoid: &[String],
    ) -> Result<()> {
        let (spec, digest) = self.reserved_spec(purpose, pin).await?;
        let reservation = Reservation {
            vm: self.vm,
            name,
            purpose,
            pin,
            avoid,
            spec: &spec,
        };
        let pod = reservation_pod::build(&reservation, &self.context.args)?;
        let api: Api<Pod> = self.namespaced();
        let created = api.create(&PostParams::default(), &pod).await;
        self.reservation_answered(purpose, created.as_ref().err())
            .await?;
        let uid = created?.uid().context("the new pod has no UID")?;
        self.memory.reservations.push(ReservationRecord {
            uid,
            name: name.to_owned(),
            purpose: purpose.clone(),
            digest,
            made: self.now,
        });
        Ok(())
    }

    /// The spec that a reservation pod is sized for: of the running guest if there is one, which a later
    /// edit of the VirtualMachine does not change, else of the VirtualMachine.
    async fn reserved_spec(
        &mut self,
        purpose: &Purpose,
        pin: Option<&str>,
    ) -> Result<(VmSpec, SpecDigest)> {
        if matches!(purpose, Purpose::Migration(_)) || pin.is_some() {
            let records = self.memory.reservations.iter();
            let current = records.filter(|record| record.purpose == Purpose::Current);
            let newest = current.max_by_key(|record| record.made);
            let digest = newest.map(|record| record.digest);
            if let (Some(digest), Some(spec)) = (digest, self.running_spec().await?) {
                return Ok((spec, digest));
            }
        }
        Ok((crate::vm_intent::vm_spec(self.vm)?, self.intent.digest))
    }

    pub(super) async fn create_migration(&self, name: &str, mode: MigrationMode) -> Result<()> {
        let spec = VirtualMachineMigrationSpec {
            virtual_machine: self.intent.name.clone(),
            mode,
            target: None,
            downtime: None,
            timeout: None,
            bandwidth: None,
            cancel: false,
        };
        let mut migration = VirtualMachineMigration::new(name, spec);
        migration.metadata.labels = Some(BTreeMap::from([
            (LABEL_VM.to_owned(), self.intent.name.clone()),
            (LABEL_TRIGGER.to_owned(), TRIGGER_DRAIN.to_owned()),
        ]));
        migration.metadata.owner_references = self.vm.owner_ref(&()).map(|owner| vec![owner]);
        let api: Api<VirtualMachineMigration> = self.namespaced();
        ignore_already_exists(api.create(&PostParams::default(), &migration).await)
    }

    pub(super) async fn create_failover(
        &self,
        name: &str,
        node: &str,
        owner: Owner,
        epoch: Epoch,
    ) -> Result<()> {
        let spec = FailoverSpec {
            virtual_machine: self.intent.name.clone(),
            uid: self.intent.uid.to_string(),
            node: node.to_owned(),
            volume: self.intent.volume.clone(),
            owner: api_owner(owner),
            epoch: epoch.to_string(),
        };
        let failover = Failover {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                labels: Some(BTreeMap::from([(
                    LABEL_VM.to_owned(),
                    self.intent.name.clone(),
                )])),
                owner_references: self.vm.owner_ref(&()).map(|owner| vec![owner]),
                ..ObjectMeta::default()
            },
            spec,
            status: None,
        };
        let api: Api<Failover> = self.namespaced();
        ignore_already_exists(api.create(&PostParams::default(), &failover).await)
    }

    pub(crate) async fn publish_event(&self, reason: &str, message: &str, warning: bool) {
        let event = Event {
            type_: if warning {
                EventType::Warning
            } else {
                EventType::Normal
            },
            reason: reason.to_owned(),
            note: Some(message.chars().take(EVENT_CHARS_MAX).collect()),
            action: "Reconcile".to_owned(),
            secondary: None,
        };
        tracing::info!(reason, message, "event");
        let reference = self.vm.object_ref(&());
        if let Err(error) = self.context.recorder.publish(&event, &reference).await {
            tracing::debug!(%error, "cannot publish an event");
        }
    }
}

/// The API server refuses events with a note longer than 1 KiB.
const EVENT_CHARS_MAX: usize = 1000;

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use bascule_crds::names::reason;
    use bascule_operator_core::{Moment, PlannerMemory};
    use kube::Client;
    use kube::client::Body;
    use serde_json::Value;

    use super::*;
    use crate::context::OperatorContext;

    const QUOTA: &str = "pods \"web-e1-0\" is forbidden: exceeded quota: mem, requested: \
                         limits.memory=576Mi, used: limits.memory=576Mi, limited: limits.memory=1Gi";

    /// An API server that refuses the first two pods for a quota. What it was sent is in the list.
    fn api_server() -> (Client, Arc<Mutex<Vec<Value>>>) {
        let (service, mut handle) =
            tower_test::mock::pair::<http::Request<Body>, http::Response<Body>>();
        let sent = Arc::new(Mutex::new(vec![]));
        let list = Arc::clone(&sent);
        tokio::spawn(async move {
            let mut pods = 0;
            while let Some((request, answer)) = handle.next_request().await {
                let bytes = request.into_body().collect_bytes().await.unwrap();
                let object: Value = serde_json::from_slice(&bytes).unwrap();
                pods += usize::from(object["kind"] == "Pod");
                let refused = object["kind"] == "Pod" && pods <= 2;
                list.lock().unwrap().push(object.clone());
                let status = json!({
                    "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 403,
                    "reason": "Forbidden", "message": QUOTA,
                });
                let (code, body) = if refused {
                    (403, status)
                } else {
                    let mut made = object;
                    made["metadata"]["uid"] = json!("made");
                    (201, made)
                };
                let body = Body::from(serde_json::to_vec(&body).unwrap());
                answer.send_response(http::Response::builder().status(code).body(body).unwrap());
            }
        });
        (Client::new(service, "default"), sent)
    }

    fn vm() -> VirtualMachine {
        serde_json::from_value(json!({
            "apiVersion": "bascule.dev/v1alpha1",
            "kind": "VirtualMachine",
            "metadata": {
                "name": "web", "namespace": "shop", "labels": {"app": "db"},
                "uid": "6fa459ea-ee8a-4ca4-894e-db77e160355e",
            },
            "spec": {
                "memory": "512Mi", "volume": "san", "boot": {"kernel": {"hostFile": {"name": "k"}}},
            },
        }))
        .unwrap()
    }

    /// Regression: a quota's refusal was only logged.
    #[tokio::test]
    async fn a_refused_reservation_is_remembered_with_the_quota_and_told_in_one_event() {
        let (client, sent) = api_server();
        let context = OperatorContext::test(client);
        let vm = vm();
        let intent = crate::vm_intent::intent(&vm).unwrap();
        let mut memory = PlannerMemory::default();
        let mut outcomes = vec![];
        for second in 1..=3 {
            let mut execution = Execution {
                context: &context,
                vm: &vm,
                intent: &intent,
                now: Moment(second * 1000),
                memory: &mut memory,
            };
            let create = Action::CreateReservation {
                name: "web-e1-0".to_owned(),
                purpose: Purpose::Current,
                pin: None,
                avoid: vec![],
            };
            let ran = execution.run(&[create]).await;
            outcomes.push((
                ran.map_err(|error| error.is::<Refused>()),
                memory.reservation_refusal.clone(),
            ));
        }
        for (at, (ran, refusal)) in (1..).zip(&outcomes[..2]) {
            assert_eq!(*ran, Err(true), "a refusal, not a malfunction");
            let refusal = refusal.as_ref().unwrap();
            assert_eq!(
                (refusal.at, refusal.reason),
                (Moment(at * 1000), reason::QUOTA_EXCEEDED)
            );
            assert!(refusal.message.ends_with(QUOTA), "{}", refusal.message);
        }
        assert_eq!(outcomes[2], (Ok(()), None), "forgotten once one is created");
        let made: Vec<_> = memory
            .reservations
            .iter()
            .map(|r| (&*r.name, &*r.uid))
            .collect();
        assert_eq!(made, [("web-e1-0", "made")], "the operator knows its own");
        let sent = sent.lock().unwrap();
        let kinds: Vec<&str> = sent.iter().filter_map(|o| o["kind"].as_str()).collect();
        assert_eq!(kinds, ["Pod", "Event", "Pod", "Pod"]);
        assert_eq!(sent[1]["reason"], reason::QUOTA_EXCEEDED);
        assert_eq!(sent[0]["metadata"]["labels"]["app"], "db");
        let resources = &sent[0]["spec"]["containers"][0]["resources"];
        assert_eq!(
            resources["limits"]["memory"],
            resources["requests"]["memory"]
        );
    }
}
