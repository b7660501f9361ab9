//! Helpers for calls to the Kubernetes API, and conversions into its types.

use anyhow::Result;
use bascule_crds::names::FIELD_MANAGER;
use bascule_types::Owner;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::api::{Patch, PatchParams};
use kube::{Api, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

/// Parameters of every server-side apply. `force`, because the operator is the only writer of what it
/// applies.
pub(crate) fn apply_params() -> PatchParams {
    PatchParams::apply(FIELD_MANAGER).force()
}

/// Writes the status subresource by server-side apply.
pub(crate) async fn apply_status<K>(
    api: &Api<K>,
    name: &str,
    status: &impl Serialize,
) -> kube::Result<K>
where
    K: Resource<DynamicType = ()> + DeserializeOwned,
{
    let patch = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "status": status,
    });
    api.patch_status(name, &apply_params(), &Patch::Apply(&patch))
        .await
}

/// Treats AlreadyExists as success: object names are deterministic, so the object that exists is the
/// one that was to be created.
pub(crate) fn ignore_already_exists<K>(outcome: kube::Result<K>) -> Result<()> {
    match outcome {
        Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => Ok(()),
        other => Ok(other.map(drop)?),
    }
}

/// Treats NotFound as success: the object was deleted in the meantime.
pub(crate) fn ignore_not_found<K>(outcome: kube::Result<K>) -> Result<()> {
    match outcome {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => Ok(other.map(drop)?),
    }
}

/// Whether the API server refused to create an object because its namespace is being deleted.
pub(crate) fn is_namespace_terminating(error: &kube::Error) -> bool {
    let kube::Error::Api(status) = error else {
        return false;
    };
    let causes = status.details.as_ref().map_or(&[][..], |d| &d.causes);
    causes
        .iter()
        .any(|cause| cause.reason == NAMESPACE_TERMINATING)
}

/// The text of a condition's status.
pub(crate) const fn condition_status(status: Option<bool>) -> &'static str {
    match status {
        Some(true) => "True",
        Some(false) => "False",
        None => "Unknown",
    }
}

/// A condition without `observedGeneration`, which the caller sets where the object has a spec that
/// changes.
pub(crate) fn new_condition(
    type_: &str,
    status: &str,
    reason: &str,
    message: &str,
    now: Timestamp,
) -> Condition {
    Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        observed_generation: None,
        last_transition_time: Time(now),
    }
}

/// Slot and generation as the API writes them.
pub(crate) fn api_owner(owner: Owner) -> bascule_crds::Owner {
    bascule_crds::Owner {
        slot: i32::from(owner.slot.0),
        generation: owner.generation.to_string(),
    }
}

/// `k8s.io/api/core/v1`: `NamespaceTerminatingCause`.
const NAMESPACE_TERMINATING: &str = "NamespaceTerminating";

#[cfg(test)]
mod tests {
    use super::*;

    fn forbidden(causes: &serde_json::Value) -> kube::Error {
        let status = json!({
            "status": "Failure", "code": 403, "reason": "Forbidden", "message": "no",
            "details": {"causes": causes},
        });
        kube::Error::Api(serde_json::from_value(status).unwrap())
    }

    #[test]
    fn a_terminating_namespace_is_distinguished_from_missing_permissions() {
        let terminating = json!([{"reason": "NamespaceTerminating", "message": "", "field": ""}]);
        assert!(is_namespace_terminating(&forbidden(&terminating)));
        assert!(!is_namespace_terminating(&forbidden(&json!([]))));
    }
}
