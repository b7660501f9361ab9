//! The paths of the API.

use std::sync::Arc;

use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use bascule_crds::names::{SUBRESOURCES_GROUP, VERSION};
use kube::Client;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::access::{self, Target};
use super::front_proxy::{ProxyRx, User};
use super::status::Failure;
use super::{guest_output, websocket};
use crate::node_clients::NodeClients;

/// What the handlers share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) client: Client,
    pub(super) nodes: NodeClients,
    pub(super) proxy_rx: ProxyRx,
    /// One permit for each console that is open.
    pub(super) consoles: Arc<Semaphore>,
}

/// The VirtualMachine that a path names.
#[derive(Debug, Deserialize)]
struct Named {
    namespace: String,
    name: String,
}

#[derive(Debug, Deserialize)]
struct ConsoleQuery {
    /// The position of the first byte that the client has not seen.
    from: Option<u64>,
}

pub(super) fn router(shared: Shared) -> Router {
    let group = format!("/apis/{SUBRESOURCES_GROUP}/{VERSION}");
    let vm = format!("{group}/namespaces/{{namespace}}/virtualmachines/{{name}}");
    Router::new()
        .route(&group, get(|| async { Json(resources()) }))
        .route(&format!("{vm}/log"), get(log))
        .route(&format!("{vm}/console"), get(console))
        .fallback(|| async { Failure::not_found("there is no such resource") })
        .with_state(shared)
}

/// Discovery, which the API server also takes for a sign of life.
fn resources() -> Value {
    let resource = |name: &str, kind: &str, verbs: &[&str]| json!({"name": name, "singularName": "", "namespaced": true, "kind": kind, "verbs": verbs});
    json!({
        "kind": "APIResourceList", "apiVersion": "v1",
        "groupVersion": format!("{SUBRESOURCES_GROUP}/{VERSION}"),
        "resources": [
            resource("virtualmachines/console", "Console", &["create", "get"]),
            resource("virtualmachines/log", "Log", &["get"]),
        ],
    })
}

async fn log(
    State(shared): State<Shared>,
    Path(named): Path<Named>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let target = named.target("log", &["get"])?;
    access::check(&shared.client, &shared.user(&headers)?, &target).await?;
    let vm = guest_output::uid_of(&shared.client, &target.namespace, &target.name).await?;
    let output = guest_output::last_output(&shared.nodes, vm).await?;
    let bytes = [(header::CONTENT_TYPE, "application/octet-stream")];
    Ok((bytes, output).into_response())
}

async fn console(
    State(shared): State<Shared>,
    Path(named): Path<Named>,
    Query(ConsoleQuery { from }): Query<ConsoleQuery>,
    request: Request,
) -> Result<Response, Failure> {
    let target = named.target("console", &["get", "create"])?;
    let user = shared.user(request.headers())?;
    access::check(&shared.client, &user, &target).await?;
    let upgrade = websocket::Upgrade::of(request)?;
    let permit = Arc::clone(&shared.consoles).try_acquire_owned();
    let permit = permit.map_err(|_| {
        let message = "too many consoles are open";
        Failure::new(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests", message)
    })?;
    let vm = guest_output::uid_of(&shared.client, &target.namespace, &target.name).await?;
    let console = guest_output::console(&shared.nodes, vm, from).await?;
    let Target {
        namespace, name, ..
    } = target;
    tracing::info!(namespace, name, user = user.name, "a console is opened");
    Ok(upgrade.accept(async move |socket| {
        websocket::relay(socket, console).await;
        tracing::info!(namespace, name, user = user.name, "a console is closed");
        drop(permit);
    }))
}

impl Shared {
    /// The user, as the API server says.
    fn user(&self, headers: &HeaderMap) -> Result<User, Failure> {
        let proxy = self.proxy_rx.borrow().clone();
        let user = proxy.and_then(|proxy| proxy.user(headers));
        user.ok_or_else(|| Failure::forbidden("the API server has named no user"))
    }
}

impl Named {
    fn target(
        &self,
        subresource: &'static str,
        verbs: &'static [&'static str],
    ) -> Result<Target, Failure> {
        if ![&self.namespace, &self.name]
            .into_iter()
            .all(|name| is_name(name))
        {
            return Err(Failure::bad_request("not the name of an object"));
        }
        Ok(Target {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            subresource,
            verbs,
        })
    }
}

/// Whether it consists of the characters of object names, so that it has one meaning in every path.
fn is_name(text: &str) -> bool {
    let allowed =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
    (1..=NAME_BYTES_MAX).contains(&text.len())
        && text.bytes().all(allowed)
        && !text.starts_with('.')
}

/// RFC 1123, as Kubernetes applies it.
const NAME_BYTES_MAX: usize = 253;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_another_meaning_in_a_path_is_none() {
        for good in ["web", "web-1.shop", "0"] {
            assert!(is_name(good), "{good}");
        }
        let long = "x".repeat(254);
        for bad in ["", ".", "..", "a/b", "a%2fb", "Web", "a b", "a?b", &long] {
            assert!(!is_name(bad), "{bad}");
        }
    }

    #[test]
    fn typing_demands_a_right_that_a_reader_of_everything_has_not() {
        let named = Named {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
        };
        let verbs = resources()["resources"][0]["verbs"].clone();
        assert_eq!(verbs, json!(["create", "get"]));
        let target = named.target("console", &["get", "create"]).unwrap();
        assert_eq!(
            (target.namespace.as_str(), target.name.as_str()),
            ("shop", "web")
        );
    }
}
