//! The API server as a client: it authenticates users, and says who they are in headers. Whoever has a certificate of the
//! front proxy's authority may claim to be any user, so the authority is the one that the API server publishes, and a
//! request without such a certificate is refused in the TLS handshake.
//!
//! The rules are those of Kubernetes' "Configure the Aggregation Layer".

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use axum::http::HeaderMap;
use axum::serve::Listener;
use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::server::TlsStream;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::OwnIdentity;
use crate::tls::{self, CurrentCertificate, HandshakeConfig};

/// How the API server proves who it is, and names users.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FrontProxy {
    /// The authorities of its certificate, PEM.
    ca_pem: String,
    /// The common names that its certificate may have; empty for any.
    names: Vec<String>,
    user: Vec<String>,
    uid: Vec<String>,
    group: Vec<String>,
    extra_prefix: Vec<String>,
}

/// A user whom the API server has authenticated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) uid: Option<String>,
    pub(super) groups: Vec<String>,
    pub(super) extra: BTreeMap<String, Vec<String>>,
}

/// The present one; none before it was read.
pub(super) type ProxyRx = watch::Receiver<Option<Arc<FrontProxy>>>;

impl FrontProxy {
    fn parse(map: &ConfigMap) -> Result<Self> {
        let data = map.data.as_ref();
        let text = |key: &str| data.and_then(|data| data.get(key));
        let list = |key: &str| -> Result<Vec<String>> {
            let Some(text) = text(key) else {
                return Ok(Vec::new());
            };
            serde_json::from_str(text).with_context(|| format!("parse {key}"))
        };
        let ca_pem = text("requestheader-client-ca-file");
        let ca_pem = ca_pem.context(
            "the API server has no front proxy: its aggregation layer is not configured",
        )?;
        let proxy = Self {
            ca_pem: ca_pem.clone(),
            names: list("requestheader-allowed-names")?,
            user: list("requestheader-username-headers")?,
            uid: list("requestheader-uid-headers")?,
            group: list("requestheader-group-headers")?,
            extra_prefix: list("requestheader-extra-headers-prefix")?,
        };
        ensure!(!proxy.user.is_empty(), "the API server names no user");
        Ok(proxy)
    }

    fn roots(&self) -> Result<RootCertStore> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(self.ca_pem.as_bytes()) {
            let certificate = certificate.context("parse the front proxy's authority")?;
            roots
                .add(certificate)
                .context("take the front proxy's authority")?;
        }
        Ok(roots)
    }

    /// Whether a certificate of the authority is the front proxy's.
    fn accepts(&self, certificate: &[u8]) -> bool {
        let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
            return false;
        };
        let mut names = certificate.subject().iter_common_name();
        let name = names.next().and_then(|name| name.as_str().ok());
        self.names.is_empty() || name.is_some_and(|name| self.names.iter().any(|n| n == name))
    }

    /// The user that a request names; none where it names none.
    pub(super) fn user(&self, headers: &HeaderMap) -> Option<User> {
        let all = |names: &[String]| -> Vec<String> {
            let values = names.iter().flat_map(|name| headers.get_all(name));
            let values = values.filter_map(|value| value.to_str().ok());
            values.map(str::to_owned).collect()
        };
        let name = all(&self.user).into_iter().find(|name| !name.is_empty())?;
        let mut extra: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (header, value) in headers {
            let key = self.extra_prefix.iter().find_map(|prefix| {
                header
                    .as_str()
                    .strip_prefix(prefix.to_ascii_lowercase().as_str())
            });
            if let (Some(key), Ok(value)) = (key, value.to_str()) {
                extra
                    .entry(unescape(key))
                    .or_default()
                    .push(value.to_owned());
            }
        }
        Some(User {
            name,
            uid: all(&self.uid).into_iter().next(),
            groups: all(&self.group),
            extra,
        })
    }
}

/// Keys of extra fields are percent-encoded, because header names have fewer characters.
fn unescape(key: &str) -> String {
    let mut bytes = Vec::with_capacity(key.len());
    let mut rest = key.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped = match rest {
            [b'%', high, low, ..] => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                let value = digit(*high)
                    .zip(digit(*low))
                    .map(|(high, low)| high * 16 + low);
                value.and_then(|value| u8::try_from(value).ok())
            }
            _ => None,
        };
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() {
            rest.get(3..).unwrap_or_default()
        } else {
            tail
        };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Keeps the front proxy current, as the API server publishes it.
pub(super) async fn follow(client: Client, proxy_tx: watch::Sender<Option<Arc<FrontProxy>>>) {
    let maps: Api<ConfigMap> = Api::namespaced(client, "kube-system");
    let found = watcher::watch_object(maps, "extension-apiserver-authentication").default_backoff();
    let mut found = std::pin::pin!(found);
    while let Some(event) = found.next().await {
        let proxy = match event {
            Ok(Some(map)) => FrontProxy::parse(&map).map(|proxy| Some(Arc::new(proxy))),
            Ok(None) => Ok(None),
            // The watcher restarts by itself, with exponential backoff.
            Err(error) => {
                tracing::warn!(%error, "watch of the front proxy's authority interrupted");
                continue;
            }
        };
        match proxy {
            Ok(proxy) => drop(proxy_tx.send_replace(proxy)),
            Err(error) => tracing::warn!(
                error = format!("{error:#}"),
                "the console cannot be reached"
            ),
        }
    }
}

/// TLS with the operator's present certificate, for clients with a certificate of the present front proxy.
#[derive(Clone, Debug)]
pub(super) struct ProxyTls {
    certificate: Arc<CurrentCertificate>,
    proxy_rx: ProxyRx,
}

impl ProxyTls {
    pub(super) fn new(identity: OwnIdentity, proxy_rx: ProxyRx) -> Self {
        Self {
            certificate: Arc::new(CurrentCertificate::new(Arc::new(identity))),
            proxy_rx,
        }
    }

    fn config(&self, proxy: &FrontProxy) -> Result<ServerConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let roots = Arc::new(proxy.roots()?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider));
        let verifier = verifier
            .build()
            .context("set up the verification of clients")?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .context("set up TLS")?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::clone(&self.certificate) as _);
        // A WebSocket needs it, and the API server's other requests are few.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

impl HandshakeConfig for ProxyTls {
    fn get(&self) -> Option<Arc<ServerConfig>> {
        let proxy = self.proxy_rx.borrow().clone()?;
        match self.config(&proxy) {
            Ok(config) => Some(Arc::new(config)),
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "a connection is refused");
                None
            }
        }
    }
}

/// The connections of the front proxy.
pub(super) struct FrontProxyListener {
    address: SocketAddr,
    proxy_rx: ProxyRx,
    incoming: Pin<Box<dyn Stream<Item = TlsStream<TcpStream>> + Send>>,
}

impl FrontProxyListener {
    pub(super) fn new(listener: TcpListener, tls: ProxyTls) -> Result<Self> {
        Ok(Self {
            address: listener
                .local_addr()
                .context("read the listener's address")?,
            proxy_rx: tls.proxy_rx.clone(),
            incoming: Box::pin(tls::incoming(listener, "subresources", tls)),
        })
    }

    fn accepts(&self, stream: &TlsStream<TcpStream>) -> bool {
        let certificates = stream.get_ref().1.peer_certificates();
        let certificate = certificates.and_then(|chain| chain.first());
        let proxy = self.proxy_rx.borrow();
        match (certificate, proxy.as_ref()) {
            (Some(certificate), Some(proxy)) => proxy.accepts(certificate),
            _ => false,
        }
    }
}

impl Listener for FrontProxyListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            match self.incoming.next().await {
                Some(stream) if self.accepts(&stream) => return (stream, self.address),
                Some(_) => tracing::warn!("a client other than the front proxy was refused"),
                None => std::future::pending().await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(self.address)
    }
}

#[cfg(test)]
mod tests;
