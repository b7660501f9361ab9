//! The protocol between nodes: a `bascule-volume` sends a request to the `bascule-volume` of the
//! coordinator, over TCP with mTLS.
//!
//! # Constraints
//! - Both sides authenticate with a certificate of the cluster's authority; the name in the
//!   certificate is `node.bascule.dev` for every node.
//! - One request and one answer per connection. Lengths are checked before anything is read, and
//!   every step has a timeout (I7).
//!
//! # Frame
//! A `u32`, little-endian, then that many bytes of JSON, at most [`FRAME_BYTES_MAX`]. The first
//! frame in each direction is a `Hello` with the versions that the sender speaks.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bascule_ipc::Hello;
use bascule_ipc::mutual_tls::{MutualTlsError, client_config, node_server_name, server_config};
use bascule_ipc::volume::{Rows, VmRows};
use bascule_pki::{NODE_TLS_NAME, has_role};
use bascule_types::{Answer, Change, NodeUid, Owner, Refusal, VmUid, VolumeId};
use rustls::{ClientConnection, ServerConnection};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The longest frame: all rows of a large volume.
pub const FRAME_BYTES_MAX: usize = 64 << 20;

/// One request to a coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRequest {
    /// A server of another volume refuses the request.
    pub volume: VolumeId,
    /// The requesting node's UID.
    pub node: NodeUid,
    /// The requester's slot and generation, as in its heartbeat; none before it has a slot.
    pub owner: Option<Owner>,
    /// The boot id of the requester's kernel.
    pub boot: [u8; 16],
    /// The requested operation; `ask` in the JSON.
    #[serde(rename = "ask")]
    pub operation: PeerOperation,
}

/// The operation of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerOperation {
    /// Change the metadata.
    Change(Change),
    /// Return all rows of the metadata.
    Rows,
    /// Return the rows of one VM.
    Vm(VmUid),
}

/// The coordinator's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerResponse {
    /// The change is granted and durable.
    Granted(Answer),
    /// The change is refused; nothing was changed.
    Refused(Refusal),
    /// All rows of the metadata.
    Rows(Rows),
    /// The rows of the VM; none if the volume does not have it.
    Vm(Option<VmRows>),
    /// This node does not coordinate, or no longer. Whether the change happened is unknown.
    NotCoordinator,
    /// The server serves another volume.
    WrongVolume,
}

/// A failure between two nodes. Whether the change happened is unknown.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The connection failed or timed out.
    #[error("connection to the coordinator")]
    Io(#[from] io::Error),
    /// This node's TLS identity cannot be used.
    #[error("TLS set-up")]
    Identity(#[from] MutualTlsError),
    /// The TLS handshake or a record failed.
    #[error("TLS with a peer")]
    Tls(#[from] rustls::Error),
    /// The peer's certificate is not a node's.
    #[error("the peer's certificate is not a node's")]
    NotANode,
    /// A frame is longer than allowed.
    #[error("a frame of {0} bytes is too long")]
    TooLong(usize),
    /// The JSON is not the expected message.
    #[error("a malformed message")]
    Malformed(#[from] serde_json::Error),
    /// No version in common.
    #[error("no common protocol version")]
    Version(#[source] bascule_ipc::IpcError),
}

/// The TLS identity of this node. The files are read for every connection, because certificates are
/// renewed in place.
#[derive(Clone)]
pub struct Tls {
    directory: PathBuf,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tls({})", self.directory.display())
    }
}

impl Tls {
    /// The identity in `directory` ([`bascule_ipc::tls`]).
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
        }
    }

    /// Sends a request to the coordinator at `address`; `timeout` is for each read and write.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn request(
        &self,
        address: SocketAddr,
        request: &PeerRequest,
        timeout: Duration,
    ) -> Result<PeerResponse, PeerError> {
        let config = client_config(&self.directory)?;
        let mut tcp = TcpStream::connect_timeout(&address, timeout.min(CONNECT_TIMEOUT))?;
        limit(&tcp, timeout)?;
        let mut tls = ClientConnection::new(config, node_server_name())?;
        let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
        send(&mut stream, &Hello::THIS)?;
        agree(recv(&mut stream, HELLO_BYTES_MAX)?)?;
        send(&mut stream, request)?;
        recv(&mut stream, FRAME_BYTES_MAX)
    }

    /// Serves one request on an accepted connection.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn serve(
        &self,
        mut tcp: TcpStream,
        timeout: Duration,
        answer: impl FnOnce(PeerRequest) -> PeerResponse,
    ) -> Result<(), PeerError> {
        limit(&tcp, timeout)?;
        let mut tls = ServerConnection::new(server_config(&self.directory)?)?;
        let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
        agree(recv(&mut stream, HELLO_BYTES_MAX)?)?;
        send(&mut stream, &Hello::THIS)?;
        let request = recv(&mut stream, REQUEST_BYTES_MAX)?;
        check_role(&tls)?;
        let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
        let response = answer(request);
        send(&mut stream, &response)?;
        tls.send_close_notify();
        while tls.wants_write() {
            tls.write_tls(&mut tcp)?;
        }
        Ok(())
    }
}

fn limit(tcp: &TcpStream, timeout: Duration) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    tcp.set_read_timeout(Some(timeout))?;
    tcp.set_write_timeout(Some(timeout))
}

/// Accepts only the certificate of a node: the cluster's authority signs operators too.
fn check_role(tls: &ServerConnection) -> Result<(), PeerError> {
    let certificate = tls.peer_certificates().and_then(<[_]>::first);
    if certificate.is_some_and(|certificate| has_role(certificate, NODE_TLS_NAME)) {
        Ok(())
    } else {
        Err(PeerError::NotANode)
    }
}

fn agree(theirs: Hello) -> Result<u32, PeerError> {
    Hello::THIS.agree(theirs).map_err(PeerError::Version)
}

fn send<T: Serialize>(stream: &mut impl Write, message: &T) -> Result<(), PeerError> {
    let body = serde_json::to_vec(message)?;
    let length = match u32::try_from(body.len()) {
        Ok(length) if body.len() <= FRAME_BYTES_MAX => length,
        _ => return Err(PeerError::TooLong(body.len())),
    };
    stream.write_all(&length.to_le_bytes())?;
    stream.write_all(&body)?;
    Ok(stream.flush()?)
}

fn recv<T: DeserializeOwned>(stream: &mut impl Read, max: usize) -> Result<T, PeerError> {
    let mut head = [0; 4];
    stream.read_exact(&mut head)?;
    let length = u32::from_le_bytes(head) as usize;
    if length > max {
        return Err(PeerError::TooLong(length));
    }
    let mut body = Vec::new();
    let read = stream.take(length as u64).read_to_end(&mut body)?;
    if read < length {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(serde_json::from_slice(&body)?)
}

/// The frames of this protocol without TLS, for the targets of `fuzz/`.
#[cfg(feature = "fuzzing")]
pub mod frames {
    use super::{
        FRAME_BYTES_MAX, HELLO_BYTES_MAX, Hello, PeerError, PeerRequest, PeerResponse,
        REQUEST_BYTES_MAX, Read, Serialize, Write,
    };

    /// The version that a peer's first frame leads to.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn hello(from: &mut impl Read) -> Result<u32, PeerError> {
        super::agree(super::recv::<Hello>(from, HELLO_BYTES_MAX)?)
    }

    /// A request as its server reads it.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn request(from: &mut impl Read) -> Result<PeerRequest, PeerError> {
        super::recv(from, REQUEST_BYTES_MAX)
    }

    /// An answer as its client reads it.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn response(from: &mut impl Read) -> Result<PeerResponse, PeerError> {
        super::recv(from, FRAME_BYTES_MAX)
    }

    /// Writes a frame.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn write(message: &impl Serialize, to: &mut impl Write) -> Result<(), PeerError> {
        super::send(to, message)
    }
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const HELLO_BYTES_MAX: usize = 1 << 10;
/// The largest change has a few ids and one name.
const REQUEST_BYTES_MAX: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use bascule_types::{Epoch, Generation, SlotId};

    use super::*;

    #[test]
    fn the_first_request_of_version_1_has_these_bytes_on_the_wire() {
        let owner = Owner {
            slot: SlotId(3),
            generation: Generation(7),
        };
        let request = PeerRequest {
            volume: VolumeId::from_bytes([0x11; 16]),
            node: NodeUid::from_bytes([0x22; 16]),
            owner: Some(owner),
            boot: [1; 16],
            operation: PeerOperation::Change(Change::Release {
                vm: VmUid::from_bytes([0x33; 16]),
                from: owner,
                epoch: Epoch(5),
            }),
        };
        let mut wire = Vec::new();
        send(&mut wire, &request).unwrap();
        let golden = concat!(
            r#"{"volume":"11111111-1111-1111-1111-111111111111","#,
            r#""node":"22222222-2222-2222-2222-222222222222","#,
            r#""owner":{"slot":3,"generation":7},"boot":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"#,
            r#""ask":{"Change":{"Release":{"vm":"33333333-3333-3333-3333-333333333333","#,
            r#""from":{"slot":3,"generation":7},"epoch":5}}}}"#,
        );
        assert_eq!(String::from_utf8(wire[4..].to_vec()).unwrap(), golden);
        let read: PeerRequest = recv(&mut wire.as_slice(), REQUEST_BYTES_MAX).unwrap();
        assert_eq!(read, request);
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_before_it_is_read() {
        let wire = [0xFF; 8];
        let refused = recv::<Hello>(&mut wire.as_slice(), HELLO_BYTES_MAX);
        assert!(matches!(refused, Err(PeerError::TooLong(_))), "{refused:?}");
    }
}
