//! Node enrollment: exchanges the pod's service account token for a node certificate, and renews the
//! certificate when less than a third of its life is left.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bascule_ipc::tls::TlsIdentity;
use bascule_node_api::proto::JoinRequest;
use bascule_node_api::proto::join_client::JoinClient;
use bascule_node_api::{HostPort, NODE_PORT, connect};
use bascule_pki::OPERATOR_TLS_NAME;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

use super::certificate::{self, is_current, is_usable};
use super::node_identity::Identity;
use super::token::node_of;
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
    // Otherwise the next look at the token would have this node join again, and again.
    ensure!(
        node_of(&token).is_none_or(|uid| uid == identity.node),
        "the operator answers for node {}, which is not the one of the token",
        identity.node
    );
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
///
/// An identity under another name came with a copied state directory and is never used.
pub(crate) async fn join_or_resume(
    args: &EnrollArgs,
    paths: &Paths,
    address: IpAddr,
) -> Result<Identity> {
    loop {
        let present = Identity::load(paths)?;
        let fit = fit(args, present.as_ref());
        if let Some(identity) = present.clone()
            && fit == Fit::Same
            && is_current(paths)
        {
            return Ok(identity);
        }
        match (join(args, paths, address).await, present) {
            (Ok(identity), _) => return Ok(identity),
            (Err(error), Some(identity)) if fit != Fit::Foreign && is_usable(paths) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "cannot renew the certificate; using the current one"
                );
                return Ok(identity);
            }
            (Err(error), _) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "cannot join the cluster; retrying"
                );
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        }
    }
}

/// Resolves when this node has joined again, with its present identity; the caller then restarts its
/// server. Another UID means that the Node object was deleted and registered anew.
pub(crate) async fn renewed(args: &EnrollArgs, paths: &Paths, address: IpAddr) -> Identity {
    let (mut ticks, mut pause): (u32, Duration) = (0, RETRY_INTERVAL);
    loop {
        tokio::time::sleep(TOKEN_CHECK).await;
        ticks = ticks.wrapping_add(1);
        let present = Identity::load(paths).ok().flatten();
        let another = fit(args, present.as_ref()) != Fit::Same;
        let due = ticks.is_multiple_of(RENEWAL_TICKS) && !is_current(paths);
        if !another && !due {
            continue;
        }
        match join(args, paths, address).await {
            Ok(identity) => return identity,
            Err(error) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    another,
                    "cannot renew the certificate; retrying"
                );
            }
        }
        if another {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_INTERVAL_MAX);
        }
    }
}

/// How the stored identity goes with what the kubelet says of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fit {
    /// It is this node's, as far as the token tells.
    Same,
    /// The Node object of this name has another UID by now.
    RegisteredAnew,
    /// It belongs to a node of another name, or there is none.
    Foreign,
}

fn fit(args: &EnrollArgs, identity: Option<&Identity>) -> Fit {
    let token = std::fs::read_to_string(&args.token).unwrap_or_default();
    match identity {
        None => Fit::Foreign,
        Some(identity) if (args.node_name.as_ref()).is_some_and(|name| *name != identity.name) => {
            Fit::Foreign
        }
        Some(identity) if node_of(&token).is_some_and(|uid| uid != identity.node) => {
            Fit::RegisteredAnew
        }
        Some(_) => Fit::Same,
    }
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

const CALL_LIMIT: Duration = Duration::from_secs(10);
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// A permanent refusal costs the API server one TokenReview per minute.
const RETRY_INTERVAL_MAX: Duration = Duration::from_secs(60);
/// How often the token is read: one small file.
const TOKEN_CHECK: Duration = Duration::from_secs(2);
/// Every 10 minutes: a certificate has 30 days left when its renewal is due.
const RENEWAL_TICKS: u32 = 300;

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use bascule_node_api::proto::JoinResponse;
    use bascule_node_api::proto::join_server::{Join, JoinServer};
    use bascule_pki::Authority;
    use bascule_types::{ClusterId, NodeUid};
    use tokio::net::TcpListener;
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::transport::{Identity as TlsPair, Server, ServerTlsConfig};
    use tonic::{Request, Response, Status};

    use super::super::token::tests::token_for;
    use super::*;

    /// An operator that signs for the node that the token names.
    struct TestOperator {
        authority: Arc<Authority>,
        cluster: ClusterId,
        asked: Arc<AtomicUsize>,
    }

    #[tonic::async_trait]
    impl Join for TestOperator {
        async fn join(
            &self,
            request: Request<JoinRequest>,
        ) -> Result<Response<JoinResponse>, Status> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            let request = request.into_inner();
            let node = node_of(&request.token).ok_or_else(|| Status::unauthenticated("no node"))?;
            let certificate_pem = self.authority.sign_node(&request.csr_pem, node);
            Ok(Response::new(JoinResponse {
                certificate_pem: certificate_pem.unwrap(),
                ca_pem: self.authority.certificate_pem().to_owned(),
                node_uid: node.to_string(),
                cluster_id: self.cluster.to_string(),
            }))
        }
    }

    /// A node's directories and its operator, which is reached over IPv6 alone.
    struct Case {
        folder: tempfile::TempDir,
        args: EnrollArgs,
        asked: Arc<AtomicUsize>,
    }

    const ADDRESS: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

    impl Case {
        async fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let (authority, _) = Authority::create("test").unwrap();
            std::fs::write(folder.path().join("ca.crt"), authority.certificate_pem()).unwrap();
            let own = authority.issue_operator(&[]).unwrap();
            let tls = ServerTlsConfig::new()
                .identity(TlsPair::from_pem(own.certificate_pem, own.key_pem));
            let asked = Arc::new(AtomicUsize::new(0));
            let operator = TestOperator {
                authority: Arc::new(authority),
                cluster: ClusterId::random(),
                asked: Arc::clone(&asked),
            };
            let listener = TcpListener::bind("[::1]:0").await.unwrap();
            let address = listener.local_addr().unwrap().to_string();
            let server = Server::builder().tls_config(tls).unwrap();
            let served = { server }
                .add_service(JoinServer::new(operator))
                .serve_with_incoming(TcpListenerStream::new(listener));
            tokio::spawn(served);
            let args = EnrollArgs {
                operator: Some(address.parse().unwrap()),
                join_ca: folder.path().join("ca.crt"),
                token: folder.path().join("token"),
                node_name: Some("n1".to_owned()),
            };
            Self {
                folder,
                args,
                asked,
            }
        }

        fn paths(&self) -> Paths {
            Paths::new(Path::new("/nowhere"), self.folder.path())
        }

        fn kubelet_writes_token_for(&self, node: NodeUid) {
            std::fs::write(&self.args.token, token_for(node)).unwrap();
        }

        async fn start(&self) -> Identity {
            let paths = self.paths();
            join_or_resume(&self.args, &paths, ADDRESS).await.unwrap()
        }

        fn asked(&self) -> usize {
            self.asked.load(Ordering::Relaxed)
        }
    }

    /// It used to come back with the certificate of its old UID, which the operator refused until the
    /// certificate was due for renewal: up to two months.
    #[tokio::test]
    async fn a_node_that_was_deleted_and_registered_anew_joins_under_its_new_uid_when_it_starts() {
        let case = Case::new().await;
        let (old, new) = (NodeUid::random(), NodeUid::random());
        case.kubelet_writes_token_for(old);
        assert_eq!(case.start().await.node, old);
        assert_eq!(case.start().await.node, old);
        assert_eq!(
            case.asked(),
            1,
            "a certificate that fits is not requested again"
        );
        case.kubelet_writes_token_for(new);
        assert_eq!(case.start().await.node, new);
        let stored = Identity::load(&case.paths()).unwrap().unwrap();
        assert_eq!(stored.node, new);
        assert!(is_current(&case.paths()), "the old certificate is gone");
    }

    #[tokio::test]
    async fn a_running_daemon_notices_that_its_node_was_registered_anew() {
        let case = Case::new().await;
        let (old, new) = (NodeUid::random(), NodeUid::random());
        case.kubelet_writes_token_for(old);
        case.start().await;
        case.kubelet_writes_token_for(new);
        let limit = Duration::from_secs(60);
        let paths = case.paths();
        let joined = tokio::time::timeout(limit, renewed(&case.args, &paths, ADDRESS));
        assert_eq!(joined.await.unwrap().node, new);
    }

    /// Its guests need a daemon whether or not the operator answers.
    #[tokio::test]
    async fn a_node_that_was_registered_anew_goes_on_under_its_old_uid_while_the_operator_is_away()
    {
        let mut case = Case::new().await;
        let old = NodeUid::random();
        case.kubelet_writes_token_for(old);
        case.start().await;
        case.kubelet_writes_token_for(NodeUid::random());
        case.args.operator = Some("[::1]:1".parse().unwrap());
        assert_eq!(case.start().await.node, old);
    }

    /// A disk image of a node that is copied to another machine carries its state directory along.
    #[tokio::test]
    async fn the_identity_of_a_node_with_another_name_is_never_taken() {
        let mut case = Case::new().await;
        let (one, two) = (NodeUid::random(), NodeUid::random());
        case.kubelet_writes_token_for(one);
        case.start().await;
        case.args.node_name = Some("n2".to_owned());
        let present = Identity::load(&case.paths()).unwrap();
        assert_eq!(fit(&case.args, present.as_ref()), Fit::Foreign);
        case.kubelet_writes_token_for(two);
        let joined = case.start().await;
        assert_eq!((joined.node, joined.name.as_str()), (two, "n2"));
    }
}
