//! Garbage collection of finished VirtualMachineMigrations and Failovers. The core decides which ones
//! have expired.

use std::time::Duration;

use anyhow::{Context, Result};
use bascule_crds::{Failover, FailoverPhase, MigrationPhase, VirtualMachineMigration};
use bascule_operator_core::{ClosedRecord, RecordKind, expired};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;

use crate::clock::moment;
use crate::context::OperatorContext;
use crate::kube_api::ignore_not_found;

/// Runs until the leader's tasks are aborted.
pub(crate) async fn run(context: OperatorContext) {
    loop {
        tokio::time::sleep(GC_INTERVAL).await;
        for record in expired(closed(&context)).into_iter().take(DELETIONS_MAX) {
            if let Err(error) = delete(&context, &record).await {
                tracing::warn!(
                    namespace = record.namespace,
                    name = record.name,
                    error = format!("{error:#}"),
                    "cannot delete an expired record"
                );
                break;
            }
            tracing::debug!(?record, "deleted an expired record");
        }
    }
}

/// All records in a final phase.
fn closed(context: &OperatorContext) -> Vec<ClosedRecord> {
    let vms = context.stores.vms.state();
    let exists = |namespace: &Option<String>, name: &str| {
        vms.iter().any(|vm| {
            vm.metadata.namespace == *namespace && vm.metadata.name.as_deref() == Some(name)
        })
    };
    let record = |kind, metadata: &ObjectMeta, vm: &str| ClosedRecord {
        kind,
        namespace: metadata.namespace.clone().unwrap_or_default(),
        name: metadata.name.clone().unwrap_or_default(),
        uid: metadata.uid.clone().unwrap_or_default(),
        vm: exists(&metadata.namespace, vm).then(|| vm.to_owned()),
        created: metadata
            .creation_timestamp
            .as_ref()
            .map(|at| moment(&at.0))
            .unwrap_or_default(),
    };
    let migrations = context.stores.migrations.state();
    let migrations = migrations.iter().filter(|m| {
        let phase = m.status.as_ref().and_then(|status| status.phase);
        phase.is_some_and(MigrationPhase::is_final)
    });
    let failovers = context.stores.failovers.state();
    let failovers = failovers.iter().filter(|f| {
        let phase = f.status.as_ref().and_then(|status| status.phase);
        phase.is_some_and(FailoverPhase::is_final)
    });
    migrations
        .map(|m| record(RecordKind::Migration, &m.metadata, &m.spec.virtual_machine))
        .chain(
            failovers.map(|f| record(RecordKind::Failover, &f.metadata, &f.spec.virtual_machine)),
        )
        .collect()
}

async fn delete(context: &OperatorContext, record: &ClosedRecord) -> Result<()> {
    match record.kind {
        RecordKind::Migration => delete_as::<VirtualMachineMigration>(context, record).await,
        RecordKind::Failover => delete_as::<Failover>(context, record).await,
    }
}

async fn delete_as<K>(context: &OperatorContext, record: &ClosedRecord) -> Result<()>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned,
    K: std::fmt::Debug,
{
    let api: Api<K> = Api::namespaced(context.client.clone(), &record.namespace);
    // The UID keeps a newer record of the same name from being deleted.
    let params = DeleteParams::default().preconditions(Preconditions {
        uid: Some(record.uid.clone()),
        resource_version: None,
    });
    ignore_not_found(api.delete(&record.name, &params).await).context("delete the record")
}

/// Interval between two collections; not latency-sensitive.
const GC_INTERVAL: Duration = Duration::from_secs(30);
/// Per collection: bounds the load on the API server when there is a large backlog.
const DELETIONS_MAX: usize = 200;
