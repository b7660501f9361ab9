//! A web server over TLS whose certificate is of an authority of its own.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use bascule_lab::Lab;
use bascule_lab::image::sha256_file;
use bascule_lab::pki::{Pki, Subject};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// The server; it answers when [`Self::answer_waiting`] is called.
pub(super) struct PrivateSource {
    listener: TcpListener,
    config: Arc<ServerConfig>,
    directory: tempfile::TempDir,
    sha256: String,
    /// The value of the header Authorization without which it answers 401.
    wanted: Option<String>,
}

impl PrivateSource {
    pub(super) fn new(lab: &Lab) -> Result<Self> {
        let directory = tempfile::tempdir().context("make a directory")?;
        let image = directory.path().join("image");
        std::fs::write(&image, [0; IMAGE]).context("write an image")?;
        let (sha256, _) = sha256_file(&image)?;
        let pki = Pki::create(directory.path(), lab.family())?;
        let address = lab.family().hub();
        let identity = pki.issue(&Subject {
            user: "private",
            addresses: vec![address],
            ..Subject::default()
        })?;
        let certificate = CertificateDer::from_pem_slice(identity.cert.as_bytes());
        let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .context("protocol versions")?
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.context("a certificate")?],
                key.context("a key")?,
            )
            .context("the server's certificate")?;
        let hub = SocketAddr::new(address, 0);
        let listener = lab.hub().enter(move || TcpListener::bind(hub))?;
        let listener = listener.context("listen in the hub")?;
        listener.set_nonblocking(true).context("set up a socket")?;
        Ok(Self {
            listener,
            config: Arc::new(config),
            directory,
            sha256,
            wanted: None,
        })
    }

    /// One that refuses requests without this value of the header Authorization.
    pub(super) fn wanting(self, authorization: &str) -> Self {
        let wanted = Some(authorization.to_owned());
        Self { wanted, ..self }
    }

    /// The authority's certificate, PEM.
    pub(super) fn authority(&self) -> PathBuf {
        self.directory.path().join("ca.crt")
    }

    /// A disk that is filled from it.
    pub(super) fn disk(&self) -> String {
        self.disk_with("")
    }

    /// The same with its authority and the header Authorization from a key of a Secret.
    pub(super) fn disk_with_token(&self, secret: &str) -> String {
        let authority = std::fs::read_to_string(self.authority()).unwrap();
        let authority = serde_json::Value::from(authority);
        self.disk_with(&format!(
            ", caBundle: {authority}, authorizationFrom: {{secretKeyRef: {secret}}}"
        ))
    }

    fn disk_with(&self, fields: &str) -> String {
        let address = self.listener.local_addr().unwrap();
        let sha256 = &self.sha256;
        format!(
            "size: 64Mi, source: {{http: {{url: \"https://{address}/image\", sha256: \"{sha256}\"{fields}}}}}"
        )
    }

    /// Answers the clients that wait. One that does not trust the server ends the handshake.
    pub(super) fn answer_waiting(&self) {
        while let Ok((client, _)) = self.listener.accept() {
            if let Err(error) = self.answer(client) {
                println!("a client of the private source: {error:#}");
            }
        }
    }

    fn answer(&self, client: TcpStream) -> Result<()> {
        client.set_nonblocking(false).context("set up a socket")?;
        client
            .set_read_timeout(Some(CLIENT_LIMIT))
            .context("set up a socket")?;
        let connection = ServerConnection::new(Arc::clone(&self.config)).context("begin TLS")?;
        let mut request = BufReader::new(StreamOwned::new(connection, client));
        let mut lines = String::new();
        while request.read_line(&mut lines).context("read a request")? > 2 {}
        let mut client = request.into_inner();
        if let Some(wanted) = &self.wanted
            && !lines.contains(&format!(": {wanted}\r\n"))
        {
            let refusal =
                "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            let sent = client.write_all(refusal.as_bytes());
            return sent.and_then(|()| client.flush()).context("refuse");
        }
        let head =
            format!("HTTP/1.1 200 OK\r\nContent-Length: {IMAGE}\r\nConnection: close\r\n\r\n");
        let sent = client.write_all(head.as_bytes());
        sent.and_then(|()| client.write_all(&[0; IMAGE]))
            .and_then(|()| client.flush())
            .context("send an image")
    }
}

const IMAGE: usize = 1 << 20;
const CLIENT_LIMIT: Duration = Duration::from_secs(10);
