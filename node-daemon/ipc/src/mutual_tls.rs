//! Mutual TLS 1.3 between the nodes of a cluster: both sides show the node's certificate and verify
//! the peer's under the cluster's certificate authority.
//!
//! The identity is read for each configuration, because `bascule-node` renews it in place: callers
//! make one configuration per connection. There is no session resumption.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bascule_types::NODE_TLS_NAME;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{CipherSuite, ClientConfig, RootCertStore, ServerConfig};

use crate::tls::{TlsFilesError, TlsIdentity};

/// A node's TLS identity cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MutualTlsError {
    /// A file is missing or incomplete.
    #[error(transparent)]
    Files(#[from] TlsFilesError),
    /// The PEM text cannot be parsed.
    #[error("the identity in {folder} cannot be read")]
    Pem {
        /// The folder that [`TlsIdentity::read`] was called with.
        folder: PathBuf,
        /// The parser's error.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// Key and certificates do not fit together.
    #[error("the node's certificate is not usable")]
    Config(#[from] rustls::Error),
    /// The authority's certificate is not usable.
    #[error("the certificate authority is not usable")]
    Authority(#[from] rustls::server::VerifierBuilderError),
}

struct NodeCredentials {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
}

/// The client's configuration, with the identity in `folder`.
///
/// # Errors
/// [`MutualTlsError`].
pub fn client_config(folder: &Path) -> Result<Arc<ClientConfig>, MutualTlsError> {
    let own = NodeCredentials::read(folder)?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(own.roots)
        .with_client_auth_cert(own.chain, own.key)?;
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// The server's configuration, with the identity in `folder`. A client without a certificate of the
/// same authority is refused.
///
/// # Errors
/// [`MutualTlsError`].
pub fn server_config(folder: &Path) -> Result<Arc<ServerConfig>, MutualTlsError> {
    let own = NodeCredentials::read(folder)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(own.roots, provider()).build()?;
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(own.chain, own.key)?;
    Ok(Arc::new(config))
}

/// [`NODE_TLS_NAME`], which a client verifies in the server's certificate.
///
/// # Panics
/// Never: the name is a constant DNS name.
#[must_use]
pub fn node_server_name() -> ServerName<'static> {
    ServerName::try_from(NODE_TLS_NAME).expect("a constant DNS name")
}

impl NodeCredentials {
    fn read(folder: &Path) -> Result<Self, MutualTlsError> {
        let found = TlsIdentity::read(folder)?;
        let unreadable = |source| MutualTlsError::Pem {
            folder: folder.to_owned(),
            source,
        };
        let certificates = |text: &str| {
            CertificateDer::pem_slice_iter(text.as_bytes())
                .collect::<Result<Vec<_>, _>>()
                .map_err(unreadable)
        };
        let mut roots = RootCertStore::empty();
        for authority in certificates(&found.authorities)? {
            roots.add(authority)?;
        }
        Ok(Self {
            chain: certificates(&found.certificate)?,
            key: PrivateKeyDer::from_pem_slice(found.key.as_bytes()).map_err(unreadable)?,
            roots: Arc::new(roots),
        })
    }
}

/// Fastest cipher suite first: encryption bounds the speed of a live migration.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    let rank = |suite: CipherSuite| match suite {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => 0,
        CipherSuite::TLS13_AES_256_GCM_SHA384 => 1,
        _ => 2,
    };
    provider
        .cipher_suites
        .sort_by_key(|supported| rank(supported.suite()));
    Arc::new(provider)
}
