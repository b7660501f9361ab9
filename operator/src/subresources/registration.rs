//! The APIService object: the chart makes it, without the authority that signs this server's certificate, which the
//! operator makes at its first start.

use std::sync::Arc;

use bascule_crds::names::{FIELD_MANAGER, SUBRESOURCES_GROUP, VERSION};
use bascule_pki::Authority;
use futures::StreamExt;
use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use kube::api::{Patch, PatchParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use serde_json::json;

/// Writes the authority into the APIService whenever that has another one.
pub(super) async fn keep(client: Client, authority: Arc<Authority>) {
    let name = format!("{VERSION}.{SUBRESOURCES_GROUP}");
    let services: Api<APIService> = Api::all(client);
    let ours = authority.certificate_pem().as_bytes();
    let found = watcher::watch_object(services.clone(), &name).default_backoff();
    let mut found = std::pin::pin!(found);
    while let Some(event) = found.next().await {
        match event {
            Ok(Some(service)) if !trusts(&service, ours) => {
                let patch = json!({"spec": {"caBundle": k8s_openapi::ByteString(ours.to_vec())}});
                let params = PatchParams {
                    field_manager: Some(FIELD_MANAGER.to_owned()),
                    ..PatchParams::default()
                };
                match services.patch(&name, &params, &Patch::Merge(&patch)).await {
                    Ok(_) => tracing::info!("the API server was given the certificate authority"),
                    Err(error) => tracing::warn!(%error, "write the APIService"),
                }
            }
            Ok(Some(_)) => {}
            Ok(None) => tracing::info!("there is no APIService {name}: no console can be opened"),
            // The watcher restarts by itself, with exponential backoff.
            Err(error) => tracing::warn!(%error, "watch of the APIService interrupted"),
        }
    }
}

fn trusts(service: &APIService, ours: &[u8]) -> bool {
    let bundle = service
        .spec
        .as_ref()
        .and_then(|spec| spec.ca_bundle.as_ref());
    bundle.is_some_and(|bundle| bundle.0 == ours)
}
