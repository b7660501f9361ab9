//! Mutual TLS under the cluster's certificate authority, with the node's own certificate.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bascule_ipc::tls::TlsIdentity;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{CipherSuite, ClientConfig, RootCertStore, ServerConfig};

/// The name in every node's certificate.
const NODE_NAME: &str = "node.bascule.dev";

/// Why there is no TLS identity.
#[derive(Debug, thiserror::Error)]
pub(super) enum TlsError {
    /// A file is missing or not what it should be.
    #[error(transparent)]
    Files(#[from] bascule_ipc::tls::TlsFilesError),
    /// What is in the files cannot be parsed.
    #[error("the identity in {folder} cannot be read")]
    Pem {
        /// The folder.
        folder: PathBuf,
        /// What is wrong.
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

/// What a node shows and what it demands.
struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
}

/// The source's side.
pub(super) fn client(directory: &Path) -> Result<Arc<ClientConfig>, TlsError> {
    let identity = Identity::read(directory)?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(identity.roots)
        .with_client_auth_cert(identity.chain, identity.key)?;
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// The destination's side: a peer without a certificate of the same authority is refused.
pub(super) fn server(directory: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let identity = Identity::read(directory)?;
    let verifier =
        WebPkiClientVerifier::builder_with_provider(identity.roots, provider()).build()?;
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain, identity.key)?;
    Ok(Arc::new(config))
}

/// The name that the source demands of the destination.
pub(super) fn node_name() -> ServerName<'static> {
    ServerName::try_from(NODE_NAME).expect("a constant DNS name")
}

impl Identity {
    fn read(directory: &Path) -> Result<Self, TlsError> {
        let found = TlsIdentity::read(directory)?;
        let unreadable = |source| TlsError::Pem {
            folder: directory.to_owned(),
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

/// The fastest cipher first: a move is as fast as both sides encrypt.
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
