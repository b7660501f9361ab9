//! Helpers for calls to the Kubernetes API, and conversions into its types.

use anyhow::Result;
use bascule_crds::names::{FIELD_MANAGER, reason};
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

/// What the API server says against creating an object, if asking again unchanged would be refused
/// again: as a reason for conditions and its own words, which name a quota or a limit range. None for
/// failures that pass by themselves.
pub(crate) fn creation_refusal(error: &kube::Error) -> Option<(&'static str, String)> {
    let kube::Error::Api(status) = error else {
        return None;
    };
    // 401 and 409 pass, as do 408 and 429; 500 is what a failing admission webhook gives.
    if !matches!(status.code, 400 | 403 | 404 | 422 | 500) {
        return None;
    }
    let quota = status.code == 403 && QUOTA_WORDS.iter().any(|w| status.message.contains(w));
    let reason = if quota {
        reason::QUOTA_EXCEEDED
    } else {
        reason::RESERVATION_REFUSED
    };
    Some((
        reason,
        status.message.chars().take(MESSAGE_CHARS_MAX).collect(),
    ))
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
/// What the admission plug-ins ResourceQuota ("... quota:") and LimitRanger (the
/// rest) say; neither has a reason of its own.
const QUOTA_WORDS: [&str; 7] = [
    "exceeded quota:",
    "failed quota:",
    "status unknown for quota:",
    "usage per Container",
    "usage per Pod",
    "limit to request ratio per Container",
    "limit to request ratio per Pod",
];
/// A condition's message may have 32,768 bytes; people read the first lines.
const MESSAGE_CHARS_MAX: usize = 1000;

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
    fn a_quota_or_limit_range_is_told_from_other_refusals_and_from_passing_failures() {
        let said = |code: u16, message: &str| {
            let status = json!({"status": "Failure", "code": code, "message": message});
            creation_refusal(&kube::Error::Api(serde_json::from_value(status).unwrap()))
        };
        for message in [
            "pods \"web-e1-0\" is forbidden: exceeded quota: mem, requested: requests.memory=192Mi, \
             used: requests.memory=192Mi, limited: requests.memory=256Mi",
            "pods \"web-e1-0\" is forbidden: failed quota: q: must specify limits.ephemeral-storage for: hold",
            "pods \"web-e1-0\" is forbidden: maximum memory usage per Container is 64Mi, but limit is 192Mi",
            "pods \"web-e1-0\" is forbidden: maximum memory usage per Pod is 64Mi, but limit is 201326592",
            "pods \"web-e1-0\" is forbidden: memory max limit to request ratio per Container is 1, but 2 given",
        ] {
            let expected = Some((reason::QUOTA_EXCEEDED, message.to_owned()));
            assert_eq!(said(403, message), expected);
        }
        for (code, message) in [
            (
                403,
                "pods \"web-e1-0\" is forbidden: no PriorityClass with name high was found",
            ),
            (
                403,
                "pods \"web-e1-0\" is forbidden: violates PodSecurity \"restricted:latest\"",
            ),
            (
                422,
                "Pod \"web-e1-0\" is invalid: spec.affinity: Invalid value",
            ),
            (400, "admission webhook \"policy\" denied the request: no"),
            (
                500,
                "Internal error occurred: failed calling webhook \"policy\"",
            ),
            (404, "namespaces \"shop\" not found"),
        ] {
            let expected = Some((reason::RESERVATION_REFUSED, message.to_owned()));
            assert_eq!(said(code, message), expected);
        }
        for code in [401, 408, 409, 429, 503, 504] {
            assert_eq!(said(code, "later"), None, "{code}");
        }
    }

    #[test]
    fn a_terminating_namespace_is_distinguished_from_missing_permissions() {
        let terminating = json!([{"reason": "NamespaceTerminating", "message": "", "field": ""}]);
        assert!(is_namespace_terminating(&forbidden(&terminating)));
        assert!(!is_namespace_terminating(&forbidden(&json!([]))));
    }
}
