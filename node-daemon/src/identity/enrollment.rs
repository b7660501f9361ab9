//! Node enrollment: exchanges the pod's service account token for a node certificate, and renews the
//! certificate when less than a third of its life is left.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use bascule_ipc::tls::TlsIdentity;
use bascule_node_api::proto::JoinRequest;
use bascule_node_api::proto::join_client::JoinClient;
use bascule_node_api::{HostPort, NODE_PORT, connect};
use bascule_pki::OPERATOR_TLS_NAME;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

use super::certificate::{self, is_current, is_usable};
use super::node_identity::Identity;
use crate::paths::Paths;

/// The options with which a node enrolls at the operator.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct EnrollArgs {
    /// The operator's Join service, host:port; an IPv6 address in brackets
    #[arg(long = "join", value_name = "HOST:PORT", env = "BASCULE_OPERATOR")]
    pub(crate) operator: Option<HostPort>,
    /// The cluster's certificate authority, PEM, which the operator publishes
    #[arg(long, value_name = "FILE", default_value = "/etc/bascule/ca/ca.crt")]
    pub(crate) join_ca: PathBuf,
    /// The projected service account token of audience bascule.dev
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/var/run/secrets/bascule.dev/token"
    )]
    pub(crate) token: PathBuf,
    /// This node's name
    #[arg(long, env = "BASCULE_NODE_NAME")]
    pub(crate) node_name: Option<String>,
}

/// Enrolls once. The private key is generated here and never leaves the node.
pub(crate) async fn join(args: &EnrollArgs, paths: &Paths, address: IpAddr) -> Result<Identity> {
    let operator = args
        .operator
        .as_ref()
        .context("--join HOST:PORT is missing")?;
    let name = args.node_name.clone().context("--node-name is missing")?;
    let token = read(&args.token)?;
    let ca = read(&args.join_ca)?;
    let client = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(&ca))
        .domain_name(OPERATOR_TLS_NAME);
    let endpoint = Endpoint::from_shared(format!("https://{operator}"))
        .with_context(|| format!("--join {operator}"))?
        .tls_config(client)
        .context("set up TLS")?
        .timeout(CALL_LIMIT);
    let channel = connect(&endpoint, CALL_LIMIT)
        .await
        .with_context(|| format!("reach the operator at {operator}"))?;
    let request = bascule_pki::Request::generate().context("make a key")?;
    let answer = JoinClient::new(channel)
        .join(JoinRequest {
            token: token.trim().to_owned(),
            csr_pem: request.csr_pem,
            node_name: name.clone(),
            address: std::net::SocketAddr::new(address, NODE_PORT).to_string(),
        })
        .await
        .map_err(|status| {
            anyhow::anyhow!(
                "the operator refused to let {name} join: {}",
                status.message()
            )
        })?
        .into_inner();
    let identity = Identity {
        node: answer.node_uid.parse().context("the node's UID")?,
        name,
        cluster: answer.cluster_id.parse().context("the cluster's id")?,
    };
    let tls = TlsIdentity {
        key: request.key_pem,
        certificate: answer.certificate_pem,
        authorities: answer.ca_pem,
    };
    certificate::store(paths, &tls, &identity)?;
    tracing::info!(node = %identity.node, name = %identity.name, "joined");
    Ok(identity)
}

/// Enrolls, with retries until it succeeds. When the operator is unreachable, a certificate that is
/// still valid is used, so that a node starts without the API server.
pub(crate) async fn join_or_resume(
    args: &EnrollArgs,
    paths: &Paths,
    address: IpAddr,
) -> Result<Identity> {
    loop {
        if is_current(paths)
            && let Some(identity) = Identity::load(paths)?
        {
            return Ok(identity);
        }
        match join(args, paths, address).await {
            Ok(identity) => return Ok(identity),
            Err(error) if is_usable(paths) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "cannot renew the certificate; using the current one"
                );
                return Identity::load(paths)?.context("the node's identity vanished");
            }
            Err(error) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "cannot join the cluster; retrying"
                );
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        }
    }
}

/// Resolves when the certificate has been renewed; the caller then restarts its server with it.
pub(crate) async fn renewed(args: &EnrollArgs, paths: &Paths, address: IpAddr) {
    loop {
        tokio::time::sleep(RENEWAL_CHECK).await;
        if is_current(paths) {
            continue;
        }
        match join(args, paths, address).await {
            Ok(_) => return,
            Err(error) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "cannot renew the certificate; retrying"
                );
            }
        }
    }
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

const CALL_LIMIT: Duration = Duration::from_secs(10);
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// A certificate is valid for another 30 days when its renewal is due.
const RENEWAL_CHECK: Duration = Duration::from_secs(600);
