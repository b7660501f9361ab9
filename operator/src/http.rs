//! The HTTP endpoints /metrics, /healthz and /readyz.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::sync::watch;

use crate::metrics::Metrics;

#[derive(Clone, Debug)]
struct Shared {
    metrics: Arc<Metrics>,
    ready_rx: watch::Receiver<bool>,
}

/// Serves until the future is dropped; returns only on error.
pub(crate) async fn serve(
    listen: SocketAddr,
    metrics: Arc<Metrics>,
    ready_rx: watch::Receiver<bool>,
) -> Result<()> {
    let app = router(Shared { metrics, ready_rx });
    let listener = crate::listen::listen(listen).with_context(|| format!("listen on {listen}"))?;
    axum::serve(listener, app).await.context("serve HTTP")
}

fn router(shared: Shared) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(shared)
}

/// Ready means that Join is served. A replica that is not the leader is ready too.
async fn readyz(State(shared): State<Shared>) -> impl IntoResponse {
    if *shared.ready_rx.borrow() {
        (StatusCode::OK, "ok")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "starting")
    }
}

async fn metrics(State(shared): State<Shared>) -> impl IntoResponse {
    match shared.metrics.render() {
        Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
