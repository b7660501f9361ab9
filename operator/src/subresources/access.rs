//! Whether a user may use a subresource, as the API server says.

use axum::http::StatusCode;
use bascule_crds::names::{SUBRESOURCES_GROUP, VERSION};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::api::PostParams;
use kube::{Api, Client};

use super::front_proxy::User;
use super::status::Failure;

/// What is to be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) namespace: String,
    /// The VirtualMachine's name.
    pub(super) name: String,
    pub(super) subresource: &'static str,
    /// All of them are demanded.
    pub(super) verbs: &'static [&'static str],
}

/// Refuses a user who has not all of the rights.
pub(super) async fn check(client: &Client, user: &User, target: &Target) -> Result<(), Failure> {
    for verb in target.verbs {
        let reviews: Api<SubjectAccessReview> = Api::all(client.clone());
        let answer = reviews
            .create(&PostParams::default(), &review(user, target, verb))
            .await
            .map_err(|error| {
                tracing::warn!(%error, "a right cannot be checked");
                Failure::unavailable("the API server does not say whether this is allowed")
            })?;
        let status = answer.status.unwrap_or_default();
        if !status.allowed || status.denied == Some(true) {
            return Err(refusal(user, target, verb));
        }
    }
    Ok(())
}

fn review(user: &User, target: &Target, verb: &str) -> SubjectAccessReview {
    let attributes = ResourceAttributes {
        group: Some(SUBRESOURCES_GROUP.to_owned()),
        version: Some(VERSION.to_owned()),
        resource: Some("virtualmachines".to_owned()),
        subresource: Some(target.subresource.to_owned()),
        namespace: Some(target.namespace.clone()),
        name: Some(target.name.clone()),
        verb: Some(verb.to_owned()),
        ..ResourceAttributes::default()
    };
    SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(user.name.clone()),
            uid: user.uid.clone(),
            groups: Some(user.groups.clone()),
            extra: Some(user.extra.clone()),
            resource_attributes: Some(attributes),
            non_resource_attributes: None,
        },
        ..SubjectAccessReview::default()
    }
}

/// In the API server's own words.
fn refusal(user: &User, target: &Target, verb: &str) -> Failure {
    let Target {
        namespace,
        name,
        subresource,
        ..
    } = target;
    let message = format!(
        "virtualmachines.{SUBRESOURCES_GROUP} \"{name}\" is forbidden: User \"{}\" cannot {verb} resource \
         \"virtualmachines/{subresource}\" in API group \"{SUBRESOURCES_GROUP}\" in the namespace \"{namespace}\"",
        user.name
    );
    Failure::new(StatusCode::FORBIDDEN, "Forbidden", message)
}
