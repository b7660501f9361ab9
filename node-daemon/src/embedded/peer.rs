//! A gRPC client for another node, which authenticates with this node's certificate.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bascule_ipc::tls::TlsIdentity;
use bascule_node_api::command::{Command, Outcome};
use bascule_node_api::proto::node_client::NodeClient;
use bascule_node_api::proto::{self, WatchRequest};
use bascule_node_api::report::NodeReport;
use bascule_node_api::{HostPort, VERSION, VERSION_MIN, connect};
use bascule_pki::NODE_TLS_NAME;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// A connection to another node.
#[derive(Debug)]
pub(crate) struct Peer {
    client: NodeClient<Channel>,
    runtime: tokio::runtime::Runtime,
}

impl Peer {
    pub(crate) fn connect(address: &HostPort, tls_dir: &Path) -> Result<Self> {
        let own = TlsIdentity::read(tls_dir)
            .context("find this node's certificate (`bascule-node cert issue`?)")?;
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(own.authorities))
            .identity(Identity::from_pem(own.certificate, own.key))
            .domain_name(NODE_TLS_NAME);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start the runtime")?;
        let channel = runtime.block_on(async {
            let endpoint = Endpoint::from_shared(format!("https://{address}"))
                .with_context(|| format!("the address {address}"))?
                .tls_config(tls)
                .context("set up TLS")?
                .timeout(CALL_LIMIT);
            connect(&endpoint, CONNECT_LIMIT)
                .await
                .with_context(|| format!("reach the node at {address}"))
        })?;
        Ok(Self {
            client: NodeClient::new(channel),
            runtime,
        })
    }

    /// Executes a command on the other node; a rejection is an error.
    pub(crate) fn execute(&mut self, command: &Command) -> Result<Outcome> {
        let json = serde_json::to_string(command).context("write the command")?;
        let request = proto::Command {
            version: VERSION,
            version_min: VERSION_MIN,
            json,
        };
        let answer = self
            .runtime
            .block_on(self.client.execute(request))
            .map_err(|status| anyhow::anyhow!("the other node answers: {}", status.message()))?;
        match serde_json::from_str(&answer.into_inner().json).context("read the outcome")? {
            Outcome::Rejected { message, .. } => bail!("the other node rejects: {message}"),
            Outcome::Refused(refusal) => bail!("the volume refuses: {refusal}"),
            outcome => Ok(outcome),
        }
    }

    /// The other node's current report.
    pub(crate) fn report(&mut self) -> Result<NodeReport> {
        let request = WatchRequest {
            version: VERSION,
            version_min: VERSION_MIN,
        };
        let report = self.runtime.block_on(async {
            let mut reports = self.client.watch(request).await?.into_inner();
            reports.message().await
        });
        let report = report
            .map_err(|status| anyhow::anyhow!("the other node answers: {}", status.message()))?
            .context("the other node sent no report")?;
        serde_json::from_str(&report.json).context("read the report")
    }
}

const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Preparing an incoming VM takes longest.
const CALL_LIMIT: Duration = Duration::from_secs(90);
