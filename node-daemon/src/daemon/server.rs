//! The gRPC service: authorizes the client, agrees on an API version, and executes commands.

use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use bascule_ipc::tls::TlsIdentity;
use bascule_node_api::command;
use bascule_node_api::proto::node_server::{Node, NodeServer};
use bascule_node_api::proto::{Command, ConsoleInput, Outcome, Report, WatchRequest};
use bascule_node_api::report::NodeReport;
use bascule_pki::{NODE_TLS_NAME, OPERATOR_TLS_NAME, has_role};
use futures::Stream;
use tokio::sync::watch;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::WatchStream;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

use super::console;
use super::reporter::Reporter;
use super::version::agreed_version;
use crate::processes::supervisor::Supervisor;

/// The service of one node.
#[derive(Debug)]
pub(crate) struct NodeService {
    supervisor: Arc<Supervisor>,
    report_rx: watch::Receiver<Option<NodeReport>>,
    /// Whether other nodes are authorized, too: in embedded mode there is no operator, and the source
    /// node prepares a migration here.
    trust_nodes: bool,
}

impl NodeService {
    pub(crate) fn new(
        supervisor: Arc<Supervisor>,
        report_rx: watch::Receiver<Option<NodeReport>>,
        trust_nodes: bool,
    ) -> Self {
        Self {
            supervisor,
            report_rx,
            trust_nodes,
        }
    }

    /// Authorizes the holder of the client certificate, which TLS has verified.
    fn authorize<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let certificates = request.peer_certs().unwrap_or_default();
        let holder = certificates.first().map(AsRef::as_ref).unwrap_or_default();
        if has_role(holder, OPERATOR_TLS_NAME)
            || (self.trust_nodes && has_role(holder, NODE_TLS_NAME))
        {
            Ok(())
        } else {
            Err(Status::permission_denied(
                "only the operator may call this node",
            ))
        }
    }
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn execute(&self, request: Request<Command>) -> Result<Response<Outcome>, Status> {
        self.authorize(&request)?;
        let envelope = request.into_inner();
        agreed_version(envelope.version, envelope.version_min)?;
        let command: command::Command = serde_json::from_str(&envelope.json)
            .map_err(|error| Status::invalid_argument(format!("not a command: {error}")))?;
        let supervisor = Arc::clone(&self.supervisor);
        let outcome = tokio::task::spawn_blocking(move || supervisor.execute(&command))
            .await
            .map_err(|error| Status::internal(format!("the command failed: {error}")))?;
        let json = serde_json::to_string(&outcome)
            .map_err(|error| Status::internal(format!("write the outcome: {error}")))?;
        Ok(Response::new(Outcome { json }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<Report, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.authorize(&request)?;
        let wanted = request.into_inner();
        let version = agreed_version(wanted.version, wanted.version_min)?;
        let reports = WatchStream::new(self.report_rx.clone()).filter_map(move |report| {
            let report = report?;
            Some(
                serde_json::to_string(&report)
                    .map(|json| Report { version, json })
                    .map_err(|error| Status::internal(format!("write the report: {error}"))),
            )
        });
        Ok(Response::new(Box::pin(reports)))
    }

    type ConsoleStream = console::Output;

    async fn console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        self.authorize(&request)?;
        let supervisor = Arc::clone(&self.supervisor);
        let output = console::open(supervisor, request.into_inner()).await?;
        Ok(Response::new(output))
    }
}

/// Publishes a report whenever it has changed, and at least once per second.
pub(crate) async fn publish_reports(
    supervisor: Arc<Supervisor>,
    report_tx: watch::Sender<Option<NodeReport>>,
) {
    let mut ticks = tokio::time::interval(REPORT_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut since_sent = 0;
    let reporter = Arc::new(Mutex::new(Reporter::new(supervisor)));
    loop {
        ticks.tick().await;
        let source = Arc::clone(&reporter);
        let observed = tokio::task::spawn_blocking(move || {
            let mut reporter = source.lock().unwrap_or_else(PoisonError::into_inner);
            reporter.report()
        });
        let observed = observed.await;
        match observed {
            Ok(Ok(report)) => {
                since_sent += 1;
                let repeat = since_sent >= REPORTS_PER_SECOND;
                let sent = report_tx.send_if_modified(|present| {
                    let changed = present.as_ref() != Some(&report);
                    *present = Some(report);
                    changed || repeat
                });
                if sent {
                    since_sent = 0;
                }
            }
            Ok(Err(error)) => tracing::warn!(error = format!("{error:#}"), "cannot make a report"),
            Err(error) => tracing::error!(%error, "cannot make a report"),
        }
    }
}

/// Serves until `stop` resolves. The certificates are read again at every start.
pub(crate) async fn serve(
    service: NodeService,
    listen: SocketAddr,
    tls_dir: &Path,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let own = TlsIdentity::read(tls_dir)?;
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(own.certificate, own.key))
        .client_ca_root(Certificate::from_pem(own.authorities));
    Server::builder()
        .tls_config(tls)
        .context("set up TLS")?
        .tcp_keepalive(Some(KEEPALIVE))
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .add_service(NodeServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX))
        .serve_with_shutdown(listen, stop)
        .await
        .with_context(|| format!("serve on {listen}"))
}

/// How often the node polls its processes.
const REPORT_INTERVAL: Duration = Duration::from_millis(200);
const REPORTS_PER_SECOND: u32 = 5;
/// A dead operator's connection is closed after two of these.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// A command is a spec and some identities: far smaller than this.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
