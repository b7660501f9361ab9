//! Executes a plan: each action is one call to the Kubernetes API or one command to a node daemon.

mod node;

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use bascule_crds::names::{LABEL_PURPOSE, LABEL_TRIGGER, LABEL_VM, TRIGGER_DRAIN, VM_FINALIZER};
use bascule_crds::{
    Failover, FailoverSpec, VirtualMachine, VirtualMachineMigration, VirtualMachineMigrationSpec,
};
use bascule_node_api::command::{Command, VmSpec};
use bascule_operator_core::{Action, MigrationMode, Moment, PlannerMemory, Purpose, VmIntent};
use bascule_types::{Epoch, Owner};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::events::{Event, EventType};
use kube::{Api, Resource, ResourceExt};
use serde_json::json;

use crate::context::OperatorContext;
use crate::kube_api::{
    api_owner, ignore_already_exists, ignore_not_found, is_namespace_terminating,
};
use crate::record_status;
use crate::reservation_pod::{self, Reservation};

/// A node or a volume refused an action. Conditions report it to users; it is not a reconcile error, so
/// it is logged at INFO and not counted.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(pub(crate) String);

/// Executes one plan of one VM.
pub(crate) struct Execution<'a> {
    pub(crate) context: &'a OperatorContext,
    pub(crate) vm: &'a VirtualMachine,
    pub(crate) intent: &'a VmIntent,
    pub(crate) now: Moment,
    /// The planner's memory of this VM; executing an action updates it.
    pub(crate) memory: &'a mut PlannerMemory,
}

impl Execution<'_> {
    /// Executes the actions in order and stops at the first error.
    pub(crate) async fn run(&mut self, actions: &[Action]) -> Result<()> {
        for action in actions {
            tracing::debug!(?action, "execute");
            let executed = self.execute(action).await.with_context(|| label(action));
            if let Err(error) = &executed
                && error.downcast_ref().is_some_and(is_namespace_terminating)
            {
                self.memory.namespace_ending = true;
                let why = "the namespace is being deleted".to_owned();
                return Err(anyhow::Error::new(Refused(why)).context(label(action)));
            }
            executed?;
        }
        Ok(())
    }

    async fn execute(&mut self, action: &Action) -> Result<()> {
        match action {
            Action::AddFinalizer => self.finalizer(true).await,
            Action::RemoveFinalizer => self.finalizer(false).await,
            Action::CreateReservation { .. }
            | Action::DeleteReservation { .. }
            | Action::PromoteReservation { .. } => self.reservation(action).await,
            Action::CreateMigration { name, mode } => self.create_migration(name, *mode).await,
            Action::ReportMigration { name, update } => {
                record_status::report_migration(self.context, self.vm, name, update).await
            }
            Action::CreateFailover {
                name,
                node,
                owner,
                epoch,
            } => self.create_failover(name, node, *owner, *epoch).await,
            Action::ReportFailover { name, update } => {
                record_status::report_failover(self.context, self.vm, name, update).await
            }
            Action::Event {
                reason,
                message,
                warning,
            } => {
                self.event(reason, message, *warning).await;
                Ok(())
            }
            Action::Change { via, change } => self.change(via, change).await,
            Action::EndReservation { node, pod_uid } => {
                let command = Command::EndReservation {
                    pod_uid: pod_uid.clone(),
                };
                self.command(node, &command).await.map(drop)
            }
            other => self.on_node(other).await,
        }
    }

    fn namespaced<K>(&self) -> Api<K>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.context.client.clone(), &self.intent.namespace)
    }

    async fn finalizer(&self, wanted: bool) -> Result<()> {
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

    async fn reservation(&self, action: &Action) -> Result<()> {
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
    fn reserved_spec(
        &self,
        purpose: &Purpose,
        pin: Option<&str>,
    ) -> Result<(VmSpec, bascule_operator_core::SpecDigest)> {
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

    async fn create_migration(&self, name: &str, mode: MigrationMode) -> Result<()> {
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

    async fn create_failover(
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

    async fn event(&self, reason: &str, message: &str, warning: bool) {
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

/// The name of the action's variant, as context for errors.
fn label(action: &Action) -> String {
    let text = format!("{action:?}");
    let end = text.find([' ', '{']).unwrap_or(text.len());
    text[..end].to_owned()
}

/// The API server refuses events with a note longer than 1 KiB.
const EVENT_CHARS_MAX: usize = 1000;
