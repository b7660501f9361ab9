use bascule_pki::{Authority, Identity, OPERATOR_TLS_NAME};
use bascule_types::NodeUid;
use rustls::ClientConfig;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use serde_json::json;
use tokio::io::AsyncReadExt as _;
use tokio_rustls::TlsConnector;

use super::*;

fn published(ca_pem: &str, names: &[&str]) -> FrontProxy {
    let map = json!({"data": {
        "client-ca-file": "that of the users' own certificates",
        "requestheader-client-ca-file": ca_pem,
        "requestheader-allowed-names": json!(names).to_string(),
        "requestheader-username-headers": "[\"X-Remote-User\"]",
        "requestheader-uid-headers": "[\"X-Remote-Uid\"]",
        "requestheader-group-headers": "[\"X-Remote-Group\"]",
        "requestheader-extra-headers-prefix": "[\"X-Remote-Extra-\"]",
    }});
    FrontProxy::parse(&serde_json::from_value(map).unwrap()).unwrap()
}

#[test]
fn the_user_is_who_the_headers_that_the_api_server_publishes_say() {
    let proxy = published("", &[]);
    let mut headers = HeaderMap::new();
    assert_eq!(proxy.user(&headers), None);
    for (name, value) in [
        ("x-remote-user", "jane"),
        ("x-remote-uid", "42"),
        ("x-remote-group", "shop"),
        ("x-remote-group", "system:authenticated"),
        ("x-remote-extra-scopes.example%2fall", "read"),
        ("impersonate-user", "root"),
    ] {
        headers.append(name, value.parse().unwrap());
    }
    let user = proxy.user(&headers).unwrap();
    assert_eq!(user.name, "jane");
    assert_eq!(user.uid.as_deref(), Some("42"));
    assert_eq!(user.groups, ["shop", "system:authenticated"]);
    let extra = BTreeMap::from([("scopes.example/all".to_owned(), vec!["read".to_owned()])]);
    assert_eq!(user.extra, extra);
}

#[test]
fn escapes_that_are_none_are_left_as_they_are() {
    for (key, meaning) in [
        ("a%2Fb", "a/b"),
        ("%", "%"),
        ("a%2", "a%2"),
        ("%zz", "%zz"),
        ("", ""),
    ] {
        assert_eq!(unescape(key), meaning);
    }
}

#[test]
fn an_api_server_without_an_aggregation_layer_is_named() {
    let map = json!({"data": {"client-ca-file": "x"}});
    let error = FrontProxy::parse(&serde_json::from_value(map).unwrap()).unwrap_err();
    assert!(error.to_string().contains("aggregation layer"), "{error}");
}

/// Whether a server that trusts `proxy` accepts a client with this certificate.
async fn accepted(proxy: FrontProxy, client: Option<&Identity>) -> bool {
    let (authority, _) = Authority::create("operator").unwrap();
    let mut roots = RootCertStore::empty();
    let pem = authority.certificate_pem().as_bytes();
    roots
        .add(CertificateDer::from_pem_slice(pem).unwrap())
        .unwrap();
    let own = OwnIdentity::new(Arc::new(authority), vec![]);
    let (_proxy_tx, proxy_rx) = watch::channel(Some(Arc::new(proxy)));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut listener = FrontProxyListener::new(listener, ProxyTls::new(own, proxy_rx)).unwrap();

    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match client {
        None => config.with_no_client_auth(),
        Some(identity) => {
            let certificate = CertificateDer::from_pem_slice(identity.certificate_pem.as_bytes());
            let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes());
            config
                .with_client_auth_cert(vec![certificate.unwrap()], key.unwrap())
                .unwrap()
        }
    };
    let connector = TlsConnector::from(Arc::new(config));
    let connect = async {
        let stream = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from(OPERATOR_TLS_NAME).unwrap();
        let Ok(mut stream) = connector.connect(name, stream).await else {
            return;
        };
        // With TLS 1.3 the client has connected before it is refused.
        drop(stream.read(&mut [0]).await);
    };
    tokio::select! {
        _ = listener.accept() => true,
        () = connect => false,
    }
}

#[tokio::test]
async fn only_the_front_proxy_of_the_api_server_is_served() {
    let (ours, _) = Authority::create("front proxy").unwrap();
    let (other, _) = Authority::create("other").unwrap();
    let (node, another) = (NodeUid::random(), NodeUid::random());
    let name = node.to_string();
    let proxy = || published(ours.certificate_pem(), &[&name]);
    let right = ours.issue_node(node).unwrap();
    assert!(accepted(proxy(), Some(&right)).await);
    let any_name = published(ours.certificate_pem(), &[]);
    assert!(accepted(any_name, Some(&right)).await);
    assert!(!accepted(proxy(), None).await);
    let misnamed = ours.issue_node(another).unwrap();
    assert!(!accepted(proxy(), Some(&misnamed)).await);
    let foreign = other.issue_node(node).unwrap();
    assert!(!accepted(proxy(), Some(&foreign)).await);
}
