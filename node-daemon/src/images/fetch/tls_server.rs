//! A server over TLS on loopback, for tests.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::tests::spawn;

/// Gives each connection one of its answers, in their order.
pub(super) struct TlsServer {
    pub(super) port: u16,
    requests: Arc<Mutex<Vec<String>>>,
}

impl TlsServer {
    /// With a certificate for localhost by `authority`.
    pub(super) fn start(authority: &bascule_pki::Authority, answers: &[&str]) -> Self {
        Self::begin(authority).answering(answers)
    }

    /// The same in two steps, for answers that name the port.
    pub(super) fn begin(authority: &bascule_pki::Authority) -> BegunServer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        BegunServer {
            port: listener.local_addr().unwrap().port(),
            listener,
            config: config(authority),
        }
    }

    pub(super) fn url(&self) -> String {
        format!("https://localhost:{}/image", self.port)
    }

    /// The heads of the requests that were answered, in lower case.
    pub(super) fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

/// A server that listens and does not answer yet.
pub(super) struct BegunServer {
    pub(super) port: u16,
    listener: TcpListener,
    config: Arc<ServerConfig>,
}

impl BegunServer {
    pub(super) fn answering(self, answers: &[&str]) -> TlsServer {
        let requests = Arc::new(Mutex::new(vec![]));
        let list = Arc::clone(&requests);
        let answers: Vec<String> = answers.iter().map(|text| (*text).to_owned()).collect();
        let Self {
            port,
            listener,
            config,
        } = self;
        drop(spawn(move || {
            for answer in answers {
                let (stream, _) = listener.accept().unwrap();
                serve(&config, stream, &answer, &list);
            }
        }));
        TlsServer { port, requests }
    }
}

/// A client that does not trust the certificate sends no request.
fn serve(
    config: &Arc<ServerConfig>,
    stream: TcpStream,
    answer: &str,
    requests: &Mutex<Vec<String>>,
) {
    let connection = ServerConnection::new(Arc::clone(config)).unwrap();
    let mut stream = StreamOwned::new(connection, stream);
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => request.push(byte[0]),
            _ => return,
        }
    }
    let head = String::from_utf8(request).unwrap().to_ascii_lowercase();
    requests.lock().unwrap().push(head);
    stream.write_all(answer.as_bytes()).unwrap();
    stream.conn.send_close_notify();
    stream.flush().unwrap();
}

fn config(authority: &bascule_pki::Authority) -> Arc<ServerConfig> {
    let identity = authority.issue_operator(&["localhost".to_owned()]).unwrap();
    let chain = CertificateDer::pem_slice_iter(identity.certificate_pem.as_bytes());
    let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain.collect::<Result<_, _>>().unwrap(), key)
        .unwrap();
    Arc::new(config)
}
