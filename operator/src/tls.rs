//! TLS of the operator's servers, with the certificate looked up at every handshake. tonic's own TLS keeps the
//! certificate that the server was started with, and restarting the server to renew it would break
//! handshakes in progress.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use bascule_pki::Identity;
use futures::{Stream, StreamExt};
use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::TcpListenerStream;

use crate::identity::OwnIdentity;

/// The configuration of one handshake; none while connections cannot be authenticated.
pub(crate) trait HandshakeConfig: Clone + Send + 'static {
    /// Of a handshake that begins now.
    fn get(&self) -> Option<Arc<ServerConfig>>;
}

impl HandshakeConfig for Arc<ServerConfig> {
    fn get(&self) -> Option<Arc<ServerConfig>> {
        Some(Self::clone(self))
    }
}

/// Accepts connections to `service` and completes their handshakes. A failed handshake ends that connection only.
pub(crate) fn incoming(
    listener: TcpListener,
    service: &'static str,
    config: impl HandshakeConfig,
) -> impl Stream<Item = TlsStream<TcpStream>> {
    TcpListenerStream::new(listener)
        .map(move |accepted| set_up(service, config.get(), accepted))
        .buffer_unordered(HANDSHAKES_MAX)
        .filter_map(std::future::ready)
}

async fn set_up(
    service: &'static str,
    config: Option<Arc<ServerConfig>>,
    accepted: std::io::Result<TcpStream>,
) -> Option<TlsStream<TcpStream>> {
    let stream = match accepted {
        Ok(stream) => stream,
        Err(error) => {
            tracing::warn!(%error, service, "cannot accept a connection");
            // Most likely out of file descriptors: wait for some to be closed.
            tokio::time::sleep(ACCEPT_PAUSE).await;
            return None;
        }
    };
    stream.set_nodelay(true).ok()?;
    let acceptor = TlsAcceptor::from(config?);
    match tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => Some(stream),
        Ok(Err(error)) => {
            tracing::debug!(%error, service, "a TLS handshake failed");
            None
        }
        Err(_) => None,
    }
}

/// Presents the operator's certificate that is valid now.
#[derive(Debug)]
pub(crate) struct CurrentCertificate {
    identity: Arc<OwnIdentity>,
    provider: Arc<CryptoProvider>,
    /// The parsed certificate of the last handshake, and the PEM that it was parsed from.
    last: Mutex<Option<(Identity, Arc<CertifiedKey>)>>,
}

impl CurrentCertificate {
    pub(crate) fn new(identity: Arc<OwnIdentity>) -> Self {
        Self {
            identity,
            provider: Arc::new(rustls::crypto::ring::default_provider()),
            last: Mutex::new(None),
        }
    }

    fn key(&self) -> Result<Arc<CertifiedKey>> {
        let identity = self.identity.get()?;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((old, key)) = &*last
            && old.certificate_pem == identity.certificate_pem
        {
            return Ok(Arc::clone(key));
        }
        let certificate = CertificateDer::from_pem_slice(identity.certificate_pem.as_bytes())
            .context("parse the certificate")?;
        let key =
            PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).context("parse the key")?;
        let key = self.provider.key_provider.load_private_key(key);
        let key = key.context("parse the key")?;
        let key = Arc::new(CertifiedKey::new(vec![certificate], key));
        *last = Some((identity, Arc::clone(&key)));
        Ok(key)
    }
}

impl ResolvesServerCert for CurrentCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        match self.key() {
            Ok(key) => Some(key),
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "no certificate for a server");
                None
            }
        }
    }
}

/// Concurrent handshakes; further connections wait, e.g. when all nodes of a cluster enroll at once.
const HANDSHAKES_MAX: usize = 64;
/// One or two round trips and one signature; the rest is for a loaded host (guess).
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Pause after a failed accept, so that the log does not fill.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
