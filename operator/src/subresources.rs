//! The subresources of VirtualMachines that the operator serves itself: an aggregated API, which users reach through the
//! API server with the credentials that they have there ([ADR 15](../../docs/adr/0015-console-as-an-aggregated-api.md)).
//!
//! ```text
//!   kubectl-bascule ──user's credentials──► kube-apiserver ──front proxy's certificate──► this server ──mTLS──► node daemon
//!                                           authenticates,    X-Remote-User, -Group       checks both, asks
//!                                           authorizes        behind mutual TLS           the API server again
//! ```
//!
//! | path below `/apis/subresources.bascule.dev/v1alpha1/namespaces/NAMESPACE/virtualmachines/NAME` | verbs | what it is |
//! |---|---|---|
//! | `/log` | `get` | the last 256 KiB of the guest's serial output |
//! | `/console?from=POSITION` | `get` and `create` | a WebSocket: the serial console ([`websocket`]) |
//!
//! The API server takes the WebSocket's GET request for `get`, a right that people have who may only look. So the operator
//! demands `create` too, for typing.
//!
//! - [`front_proxy`] knows the API server by its certificate, and the user by its headers.
//! - [`access`] asks whether that user may.
//! - [`api`] has the paths, [`guest_output`] the way to the guest.
//! - [`registration`] gives the API server the certificate authority by which it knows this server.

mod access;
mod api;
mod front_proxy;
mod guest_output;
mod registration;
mod status;
mod websocket;

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use bascule_pki::Authority;
use kube::Client;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use self::api::Shared;
use self::front_proxy::{FrontProxyListener, ProxyTls};
use crate::cli::Args;
use crate::identity::OwnIdentity;
use crate::node_clients::NodeClients;

/// Serves until the future is dropped; returns only on error.
pub(crate) async fn serve(
    args: Arc<Args>,
    client: Client,
    authority: Arc<Authority>,
    nodes: NodeClients,
) -> Result<()> {
    let host = format!("{SERVICE}.{}.svc", args.namespace);
    let certificate = OwnIdentity::new(Arc::clone(&authority), vec![host]);
    let (proxy_tx, proxy_rx) = watch::channel(None);
    let mut tasks: JoinSet<()> = JoinSet::new();
    tasks.spawn(front_proxy::follow(client.clone(), proxy_tx));
    tasks.spawn(registration::keep(client.clone(), authority));
    let tls = ProxyTls::new(certificate, proxy_rx.clone());
    let listener = listen(args.subresources_listen)?;
    let listener = FrontProxyListener::new(listener, tls)?;
    let shared = Shared {
        client,
        nodes,
        proxy_rx,
        consoles: Arc::new(Semaphore::new(CONSOLES_MAX)),
    };
    tokio::select! {
        served = axum::serve(listener, api::router(shared)).into_future() => {
            served.context("serve the subresources")
        }
        _ = tasks.join_next() => anyhow::bail!("a task of the subresources ended"),
    }
}

fn listen(address: SocketAddr) -> Result<tokio::net::TcpListener> {
    crate::listen::listen(address)
        .with_context(|| format!("listen on {address} for the subresources"))
}

/// The operator's Service.
const SERVICE: &str = "bascule-operator";
/// Consoles of one replica at a time; each has two connections and buffers of some 100 KiB.
const CONSOLES_MAX: usize = 256;
