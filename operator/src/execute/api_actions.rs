//! Actions that are calls to the Kubernetes API.

use std::collections::BTreeMap;

use anyhow::Result;
use bascule_crds::names::{LABEL_PURPOSE, LABEL_TRIGGER, LABEL_VM, TRIGGER_DRAIN, VM_FINALIZER};
use bascule_crds::{
    Failover, FailoverSpec, VirtualMachine, VirtualMachineMigration, VirtualMachineMigrationSpec,
};
use bascule_node_api::command::VmSpec;
use bascule_operator_core::{Action, MigrationMode, Purpose, SpecDigest};
use bascule_types::{Epoch, Owner};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::events::{Event, EventType};
use kube::{Api, Resource, ResourceExt};
use serde_json::json;

use crate::execute::execution::Execution;
use crate::kube_api::{api_owner, ignore_already_exists, ignore_not_found};
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

    pub(super) async fn execute_reservation(&self, action: &Action) -> Result<()> {
        let api: Api<Pod> = self.namespaced();
        match action {
            Action::CreateReservation {
                name,
                purpose,
                pin,
                avoid,
            } => {
                let (spec, digest) = self.reserved_spec(purpose, pin.as_deref())?;
                let reservation = Reservation {
                    vm: self.vm,
                    name,
                    purpose,
                    pin: pin.as_deref(),
                    avoid,
                    spec: &spec,
                    digest,
                };
                let pod = reservation_pod::build(&reservation, &self.context.args)?;
                ignore_already_exists(api.create(&PostParams::default(), &pod).await)
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
                let patch = json!({"metadata": {
                    "uid": uid,
                    "labels": {LABEL_PURPOSE: reservation_pod::CURRENT},
                }});
                let params = PatchParams::default();
                ignore_not_found(api.patch(name, &params, &Patch::Merge(&patch)).await)
            }
            _ => Ok(()),
        }
    }

    /// The spec that a reservation pod is sized for: of the running guest if there is one, which a later
    /// edit of the VirtualMachine does not change, else of the VirtualMachine.
    fn reserved_spec(&self, purpose: &Purpose, pin: Option<&str>) -> Result<(VmSpec, SpecDigest)> {
        if matches!(purpose, Purpose::Migration(_)) || pin.is_some() {
            let pods = self
                .context
                .stores
                .pods
                .state_filter(|p| reservation_pod::belongs_to(p, self.vm));
            let running = pods.iter().find(|p| {
                p.labels().get(LABEL_PURPOSE).map(String::as_str) == Some(reservation_pod::CURRENT)
            });
            if let Some((pod, spec)) = running.and_then(|p| Some((p, reservation_pod::spec_of(p)?)))
            {
                return Ok((spec, reservation_pod::view(pod, self.now).digest));
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

    pub(super) async fn publish_event(&self, reason: &str, message: &str, warning: bool) {
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
