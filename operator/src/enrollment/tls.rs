//! TLS of the Join service, with a certificate that is looked up at every handshake: tonic's own server
//! keeps the one that it was started with, and to start another server in its place would cut off
//! whoever is in the middle of a handshake.

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

/// The connections that have been set up. One that fails is nobody's concern but its client's.
pub(super) fn incoming(
    listener: TcpListener,
    identity: Arc<OwnIdentity>,
) -> Result<impl Stream<Item = std::io::Result<TlsStream<TcpStream>>>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let resolver = Present {
        identity,
        provider: Arc::clone(&provider),
        last: Mutex::new(None),
    };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("set up TLS")?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let connections = TcpListenerStream::new(listener)
        .map(move |accepted| set_up(acceptor.clone(), accepted))
        .buffer_unordered(HANDSHAKES_MAX)
        .filter_map(std::future::ready)
        .map(Ok);
    Ok(connections)
}

async fn set_up(
    acceptor: TlsAcceptor,
    accepted: std::io::Result<TcpStream>,
) -> Option<TlsStream<TcpStream>> {
    let stream = match accepted {
        Ok(stream) => stream,
        Err(error) => {
            tracing::warn!(%error, "a connection to Join cannot be accepted");
            // Out of descriptors, most likely: some may be given back meanwhile.
            tokio::time::sleep(ACCEPT_PAUSE).await;
            return None;
        }
    };
    stream.set_nodelay(true).ok()?;
    match tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => Some(stream),
        Ok(Err(error)) => {
            tracing::debug!(%error, "a handshake for Join failed");
            None
        }
        Err(_) => None,
    }
}

/// Shows the certificate that is good now.
#[derive(Debug)]
struct Present {
    identity: Arc<OwnIdentity>,
    provider: Arc<CryptoProvider>,
    /// The one that was shown last, and what it was read from.
    last: Mutex<Option<(Identity, Arc<CertifiedKey>)>>,
}

impl Present {
    fn key(&self) -> Result<Arc<CertifiedKey>> {
        let identity = self.identity.get()?;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((old, key)) = &*last
            && old.certificate_pem == identity.certificate_pem
        {
            return Ok(Arc::clone(key));
        }
        let certificate = CertificateDer::from_pem_slice(identity.certificate_pem.as_bytes())
            .context("read the certificate")?;
        let key =
            PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).context("read the key")?;
        let key = self.provider.key_provider.load_private_key(key);
        let key = key.context("read the key")?;
        let key = Arc::new(CertifiedKey::new(vec![certificate], key));
        *last = Some((identity, Arc::clone(&key)));
        Ok(key)
    }
}

impl ResolvesServerCert for Present {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        match self.key() {
            Ok(key) => Some(key),
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "no certificate for Join");
                None
            }
        }
    }
}

/// A cluster's nodes that all join at once take turns.
const HANDSHAKES_MAX: usize = 64;
/// One round trip and some arithmetic.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Long enough not to fill the log.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
