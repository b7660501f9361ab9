//! Node enrollment (server side): the Join service verifies a node-bound service account token with a
//! TokenReview and signs the node's certificate request. The client is in bascule-node.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bascule_crds::names::JOIN_AUDIENCE;
use bascule_node_api::proto::join_server::{Join, JoinServer};
use bascule_node_api::proto::{JoinRequest, JoinResponse};
use bascule_pki::{Authority, OPERATOR_TLS_NAME};
use bascule_types::{ClusterId, NodeUid};
use futures::StreamExt;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use k8s_openapi::api::core::v1::Node;
use kube::api::PostParams;
use kube::{Api, Client};
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::cli::Args;
use crate::identity::OwnIdentity;
use crate::tls::{self, CurrentCertificate};

/// The gRPC service `Join`.
pub(crate) struct EnrollmentService {
    client: Client,
    identity: Arc<OwnIdentity>,
    cluster: ClusterId,
    /// The only accepted user, `system:serviceaccount:<namespace>:<name>`.
    username: String,
}

impl EnrollmentService {
    pub(crate) fn new(
        client: Client,
        authority: Arc<Authority>,
        cluster: ClusterId,
        args: &Args,
    ) -> Self {
        let username = format!(
            "system:serviceaccount:{}:{}",
            args.namespace, args.node_service_account
        );
        Self {
            client,
            identity: Arc::new(OwnIdentity::new(
                authority,
                vec![OPERATOR_TLS_NAME.to_owned()],
            )),
            cluster,
            username,
        }
    }

    /// Serves until the future is dropped; returns only on error.
    pub(crate) async fn serve(self, listen: SocketAddr) -> anyhow::Result<()> {
        let listener = crate::listen::listen(listen)
            .with_context(|| format!("listen on {listen} for Join"))?;
        self.serve_on(listener).await
    }

    async fn serve_on(self, listener: TcpListener) -> anyhow::Result<()> {
        let certificate = CurrentCertificate::new(Arc::clone(&self.identity));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .context("set up TLS")?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(certificate));
        config.alpn_protocols = vec![b"h2".to_vec()];
        let incoming = tls::incoming(listener, "Join", Arc::new(config)).map(Ok::<_, Infallible>);
        Server::builder()
            .timeout(CALL_LIMIT)
            .concurrency_limit_per_connection(4)
            .add_service(JoinServer::new(self))
            .serve_with_incoming(incoming)
            .await
            .context("serve Join")
    }

    async fn review(&self, token: String) -> Result<TokenReviewStatus, Status> {
        let reviews: Api<TokenReview> = Api::all(self.client.clone());
        let review = TokenReview {
            spec: TokenReviewSpec {
                token,
                audiences: Some(vec![JOIN_AUDIENCE.to_owned()]),
            },
            ..TokenReview::default()
        };
        let answer = reviews
            .create(&PostParams::default(), &review)
            .await
            .map_err(unavailable)?;
        Ok(answer.status.unwrap_or_default())
    }
}

#[tonic::async_trait]
impl Join for EnrollmentService {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let request = request.into_inner();
        if request.token.len() > TOKEN_BYTES_MAX || request.csr_pem.len() > CSR_BYTES_MAX {
            return Err(Status::invalid_argument(
                "token or certificate request too long",
            ));
        }
        let status = self.review(request.token).await?;
        let bound = bound_node(&status, &self.username)?;
        if bound.name != request.node_name {
            let message = format!("the token is bound to node {}", bound.name);
            return Err(Status::permission_denied(message));
        }
        let nodes: Api<Node> = Api::all(self.client.clone());
        let node = nodes.get_opt(&bound.name).await.map_err(unavailable)?;
        let uid = node
            .and_then(|node| node.metadata.uid)
            .ok_or_else(|| Status::not_found(format!("there is no node {}", bound.name)))?;
        if bound.uid.is_some_and(|bound| bound != uid) {
            let message = "the token is bound to an earlier node of that name: the kubelet renews it \
                           within minutes, at once when the pod is restarted";
            return Err(Status::permission_denied(message));
        }
        let node: NodeUid = uid
            .parse()
            .map_err(|_| Status::internal("the node's UID is not a UUID"))?;
        let authority = self.identity.authority();
        let certificate_pem = authority
            .sign_node(&request.csr_pem, node)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        tracing::info!(node = bound.name, uid, "enrolled a node");
        Ok(Response::new(JoinResponse {
            certificate_pem,
            ca_pem: authority.certificate_pem().to_owned(),
            node_uid: uid,
            cluster_id: self.cluster.to_string(),
        }))
    }
}

/// The node that a service account token is bound to.
#[derive(Debug, PartialEq, Eq)]
struct BoundNode {
    name: String,
    uid: Option<String>,
}

/// The node that the token is bound to, if it is valid, of our audience and of our service account.
fn bound_node(status: &TokenReviewStatus, username: &str) -> Result<BoundNode, Status> {
    if status.authenticated != Some(true) {
        let why = status.error.as_deref().unwrap_or("it is invalid");
        return Err(Status::unauthenticated(format!(
            "the token was refused: {why}"
        )));
    }
    let for_us = |audience: &String| audience == JOIN_AUDIENCE;
    if !status.audiences.iter().flatten().any(for_us) {
        return Err(Status::unauthenticated(
            "the token's audience is not bascule.dev",
        ));
    }
    let user = status.user.clone().unwrap_or_default();
    if user.username.as_deref() != Some(username) {
        let who = user.username.unwrap_or_default();
        return Err(Status::permission_denied(format!(
            "the token is of {who}, expected {username}"
        )));
    }
    let extra = user.extra.unwrap_or_default();
    let first = |key: &str| extra.get(key).and_then(|values| values.first()).cloned();
    let name = first(EXTRA_NODE_NAME).ok_or_else(|| {
        Status::failed_precondition(
            "the token is not bound to a node: Bascule needs Kubernetes 1.33 or newer",
        )
    })?;
    Ok(BoundNode {
        name,
        uid: first(EXTRA_NODE_UID),
    })
}

/// The token can be neither accepted nor refused now; the node will retry.
#[expect(clippy::needless_pass_by_value, reason = "what map_err hands over")]
fn unavailable(error: kube::Error) -> Status {
    Status::unavailable(format!("the API server is unavailable: {error}"))
}

/// KEP-4193: the name of the node that a service account token is bound to.
const EXTRA_NODE_NAME: &str = "authentication.kubernetes.io/node-name";
/// KEP-4193: the UID of that node.
const EXTRA_NODE_UID: &str = "authentication.kubernetes.io/node-uid";
/// Typical tokens have about 1 KiB.
const TOKEN_BYTES_MAX: usize = 16 << 10;
/// A certificate request for an elliptic-curve key has less than 1 KiB.
const CSR_BYTES_MAX: usize = 16 << 10;
/// Covers two calls to the API server.
const CALL_LIMIT: Duration = Duration::from_secs(15);

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use k8s_openapi::api::authentication::v1::UserInfo;
    use tonic::Code;

    use super::*;

    const USER: &str = "system:serviceaccount:bascule-system:bascule-node";

    fn good() -> TokenReviewStatus {
        let extra = BTreeMap::from([
            (EXTRA_NODE_NAME.to_owned(), vec!["node-1".to_owned()]),
            (EXTRA_NODE_UID.to_owned(), vec!["u".to_owned()]),
        ]);
        TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(vec![JOIN_AUDIENCE.to_owned()]),
            user: Some(UserInfo {
                username: Some(USER.to_owned()),
                extra: Some(extra),
                ..UserInfo::default()
            }),
            error: None,
        }
    }

    #[test]
    fn a_node_bound_token_of_our_service_account_yields_its_node() {
        let expected = BoundNode {
            name: "node-1".to_owned(),
            uid: Some("u".to_owned()),
        };
        assert_eq!(bound_node(&good(), USER).unwrap(), expected);
    }

    #[test]
    fn every_other_token_is_refused() {
        let refused = |status: &TokenReviewStatus| bound_node(status, USER).unwrap_err();
        let unauthenticated = TokenReviewStatus {
            authenticated: Some(false),
            ..good()
        };
        assert_eq!(refused(&unauthenticated).code(), Code::Unauthenticated);
        let of_the_api = TokenReviewStatus {
            audiences: None,
            ..good()
        };
        assert_eq!(refused(&of_the_api).code(), Code::Unauthenticated);
        let mut stranger = good();
        stranger.user.as_mut().unwrap().username = Some("system:serviceaccount:x:y".to_owned());
        assert_eq!(refused(&stranger).code(), Code::PermissionDenied);
        let mut unbound = good();
        unbound.user.as_mut().unwrap().extra = None;
        let status = refused(&unbound);
        assert!(status.message().contains("1.33"), "{status}");
    }

    /// A Join service before an API server on which node-1 has the UID `node` and whose TokenReview
    /// finds a token of `token`.
    fn join_service(node: NodeUid, token: NodeUid) -> EnrollmentService {
        let (service, mut api) = tower_test::mock::pair::<
            http::Request<kube::client::Body>,
            http::Response<kube::client::Body>,
        >();
        tokio::spawn(async move {
            while let Some((request, respond)) = api.next_request().await {
                let answer = if request.uri().path().ends_with("/tokenreviews") {
                    let mut status = good();
                    let extra = &mut status.user.as_mut().unwrap().extra;
                    let uid = vec![token.to_string()];
                    extra
                        .as_mut()
                        .unwrap()
                        .insert(EXTRA_NODE_UID.to_owned(), uid);
                    serde_json::json!({"metadata": {}, "spec": {"token": ""}, "status": status})
                } else {
                    assert!(request.uri().path().ends_with("/nodes/node-1"));
                    serde_json::json!({"metadata": {"name": "node-1", "uid": node.to_string()}})
                };
                let body = kube::client::Body::from(answer.to_string().into_bytes());
                respond.send_response(http::Response::new(body));
            }
        });
        let (identity, _) = crate::identity::tests::with_days_ahead();
        EnrollmentService {
            client: Client::new(service, "default"),
            identity: Arc::new(identity),
            cluster: ClusterId::random(),
            username: USER.to_owned(),
        }
    }

    /// The certificate has the Node's present UID, and only a token of exactly that Node gets one: the
    /// machine behind an earlier Node of the name may still run.
    #[tokio::test]
    async fn a_node_that_was_registered_anew_gets_a_certificate_for_its_new_uid_with_a_new_token() {
        let (old, new) = (NodeUid::random(), NodeUid::random());
        let csr = bascule_pki::Request::generate().unwrap();
        let request = || {
            Request::new(JoinRequest {
                token: "t".to_owned(),
                csr_pem: csr.csr_pem.clone(),
                node_name: "node-1".to_owned(),
                ..JoinRequest::default()
            })
        };
        let joined = join_service(new, new).join(request()).await.unwrap();
        let joined = joined.into_inner();
        let holder = bascule_pki::holder(&csr.key_pem, &joined.certificate_pem, &joined.ca_pem);
        assert_eq!((joined.node_uid, holder), (new.to_string(), Some(new)));
        let refused = join_service(new, old).join(request()).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
        assert!(refused.message().contains("earlier node"), "{refused}");
    }

    /// The certificate that the server presents, in DER.
    fn presented(address: SocketAddr, authority_pem: &str) -> Vec<u8> {
        use rustls::pki_types::pem::PemObject;
        use rustls::pki_types::{CertificateDer, ServerName};

        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(authority_pem.as_bytes()).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let name = ServerName::try_from(OPERATOR_TLS_NAME).unwrap();
        let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        while client.is_handshaking() {
            client.complete_io(&mut stream).unwrap();
        }
        client.peer_certificates().unwrap()[0].to_vec()
    }

    async fn presented_now(address: SocketAddr, authority_pem: &str) -> Vec<u8> {
        let pem = authority_pem.to_owned();
        tokio::task::spawn_blocking(move || presented(address, &pem))
            .await
            .unwrap()
    }

    /// Regression: the Join service's certificate was issued at start-up only and expired after 90 days
    /// unless the operator was restarted before.
    #[tokio::test(flavor = "multi_thread")]
    async fn the_certificate_is_renewed_in_time_without_closing_connections() {
        let (identity, days) = crate::identity::tests::with_days_ahead();
        let authority_pem = identity.authority().certificate_pem().to_owned();
        let (service, _) = tower_test::mock::pair::<
            http::Request<kube::client::Body>,
            http::Response<kube::client::Body>,
        >();
        let join = EnrollmentService {
            client: Client::new(service, "default"),
            identity: Arc::new(identity),
            cluster: ClusterId::random(),
            username: USER.to_owned(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(join.serve_on(listener));
        let first = presented_now(address, &authority_pem).await;
        let tls = tonic::transport::ClientTlsConfig::new()
            .ca_certificate(tonic::transport::Certificate::from_pem(&authority_pem))
            .domain_name(OPERATOR_TLS_NAME);
        let channel = tonic::transport::Endpoint::from_shared(format!("https://{address}"))
            .unwrap()
            .tls_config(tls)
            .unwrap()
            .connect()
            .await
            .unwrap();
        let mut caller = bascule_node_api::proto::join_client::JoinClient::new(channel);
        // Refused before the TokenReview: there is no API server in this test.
        let mut call = async || {
            let request = JoinRequest {
                token: "x".repeat(TOKEN_BYTES_MAX + 1),
                ..JoinRequest::default()
            };
            caller.join(request).await.unwrap_err().code()
        };
        assert_eq!(call().await, Code::InvalidArgument);
        assert_eq!(presented_now(address, &authority_pem).await, first);

        days.store(61, std::sync::atomic::Ordering::Relaxed);
        assert_ne!(presented_now(address, &authority_pem).await, first);
        assert_eq!(
            call().await,
            Code::InvalidArgument,
            "the connection stays open"
        );
        assert!(!server.is_finished());
        server.abort();
    }
}
