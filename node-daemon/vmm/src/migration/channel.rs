//! Frames over TLS over TCP, with a bound on every wait.

use std::io::{self, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use bascule_ipc::mutual_tls::{self, MutualTlsError};
use bascule_migrate::wire::{Abort, AbortReason, BatchBuilder, StreamId, StreamMark};
use bascule_migrate::{Frame, FrameBuffer, FrameWriter, WireError};
use rustls::{ClientConnection, ServerConnection, StreamOwned};

/// One migration stream.
pub(super) struct Channel {
    tls: Box<dyn Duplex>,
    tcp: TcpStream,
    writer: FrameWriter,
    buffer: FrameBuffer,
}

/// Why the stream cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    #[error(transparent)]
    Tls(#[from] MutualTlsError),
    #[error("cannot {action} {peer}")]
    Io {
        action: &'static str,
        peer: SocketAddr,
        #[source]
        source: io::Error,
    },
}

trait Duplex: Read + Write + Send {}
impl<T: Read + Write + Send> Duplex for T {}

/// A socket that is read in large pieces: TLS asks for one record at a time.
struct Socket(BufReader<TcpStream>);

/// Most bytes of one read of the socket.
const READ_BYTES: usize = 256 << 10;
/// Most encrypted bytes that wait for the socket: more than a full memory frame.
const WRITE_BUFFER_BYTES: usize = 2 << 20;
/// Longest wait for the connection, and for each step of the handshake.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

impl Channel {
    /// Connects to a destination.
    pub(super) fn connect(peer: SocketAddr, tls_dir: &Path) -> Result<Self, OpenError> {
        let config = mutual_tls::client_config(tls_dir)?;
        let failed = |action| {
            move |source| OpenError::Io {
                action,
                peer,
                source,
            }
        };
        let tcp = TcpStream::connect_timeout(&peer, OPEN_TIMEOUT).map_err(failed("connect to"))?;
        let connection = ClientConnection::new(config, mutual_tls::node_server_name())
            .map_err(|error| failed("begin TLS with")(io::Error::other(error)))?;
        let socket = Socket::new(&tcp).map_err(failed("set up the connection to"))?;
        let mut stream = StreamOwned::new(connection, socket);
        stream.conn.set_buffer_limit(Some(WRITE_BUFFER_BYTES));
        while stream.conn.is_handshaking() {
            stream
                .conn
                .complete_io(&mut stream.sock)
                .map_err(failed("agree on TLS with"))?;
        }
        Ok(Self::new(Box::new(stream), tcp))
    }

    /// Takes a source's connection.
    pub(super) fn accept(tcp: TcpStream, tls_dir: &Path) -> Result<Self, OpenError> {
        let config = mutual_tls::server_config(tls_dir)?;
        let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
        let peer = tcp.peer_addr().unwrap_or(unknown);
        let failed = |action| {
            move |source| OpenError::Io {
                action,
                peer,
                source,
            }
        };
        let connection = ServerConnection::new(config)
            .map_err(|error| failed("begin TLS with")(io::Error::other(error)))?;
        let socket = Socket::new(&tcp).map_err(failed("set up the connection to"))?;
        let mut stream = StreamOwned::new(connection, socket);
        stream.conn.set_buffer_limit(Some(WRITE_BUFFER_BYTES));
        while stream.conn.is_handshaking() {
            stream
                .conn
                .complete_io(&mut stream.sock)
                .map_err(failed("agree on TLS with"))?;
        }
        Ok(Self::new(Box::new(stream), tcp))
    }

    fn new(tls: Box<dyn Duplex>, tcp: TcpStream) -> Self {
        Self {
            tls,
            tcp,
            writer: FrameWriter::new(StreamId::FIRST),
            buffer: FrameBuffer::new(StreamId::FIRST),
        }
    }

    /// The socket, which cancelling shuts down.
    pub(super) fn socket(&self) -> io::Result<TcpStream> {
        self.tcp.try_clone()
    }

    /// Bounds each later read and write of the socket.
    pub(super) fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        // Zero would mean no bound.
        let timeout = Some(timeout.max(Duration::from_millis(1)));
        self.tcp.set_read_timeout(timeout)?;
        self.tcp.set_write_timeout(timeout)
    }

    /// Sends one frame and flushes it to the socket.
    pub(super) fn send(&mut self, frame: &Frame<'_>) -> io::Result<u64> {
        let sent = self.writer.send(&mut self.tls, frame)?;
        self.tls.flush()?;
        Ok(sent)
    }

    /// Sends collected memory; it may still be on its way into the socket.
    pub(super) fn send_batch(&mut self, batch: &mut BatchBuilder) -> io::Result<u64> {
        self.writer.send_batch(&mut self.tls, batch)
    }

    /// What was sent so far.
    pub(super) const fn sent_mark(&self) -> StreamMark {
        self.writer.mark()
    }

    /// What was received so far.
    pub(super) const fn received_mark(&self) -> StreamMark {
        self.buffer.mark()
    }

    pub(super) fn receive(&mut self) -> Result<Frame<'_>, WireError> {
        self.buffer.receive(&mut self.tls)
    }

    /// Ends the stream in both directions.
    pub(super) fn close(&self) {
        if let Err(error) = self.tcp.shutdown(std::net::Shutdown::Both) {
            tracing::debug!(%error, "the stream was already down");
        }
    }

    /// Sends the peer the reason of the end, best effort.
    pub(super) fn abort(&mut self, abort: &Abort) {
        let sent = self
            .set_timeout(Duration::from_millis(200))
            .and_then(|()| self.send(&Frame::Abort(abort.clone())));
        if let Err(error) = sent {
            tracing::debug!(%error, "the abort was not sent to the peer");
        }
    }
}

impl Socket {
    fn new(tcp: &TcpStream) -> io::Result<Self> {
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(Some(OPEN_TIMEOUT))?;
        tcp.set_write_timeout(Some(OPEN_TIMEOUT))?;
        Ok(Self(BufReader::with_capacity(READ_BYTES, tcp.try_clone()?)))
    }
}

impl Read for Socket {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl Write for Socket {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.0.get_mut().write(from)
    }

    fn write_vectored(&mut self, from: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.0.get_mut().write_vectored(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.get_mut().flush()
    }
}

/// What a failed stream means to the attempt.
pub(super) fn lost(error: &io::Error) -> Abort {
    let reason = match error.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => AbortReason::Timeout,
        _ => AbortReason::Internal,
    };
    Abort::new(reason, format!("the migration stream failed: {error}"))
}

/// What a bad or missing frame means to the attempt.
pub(super) fn lost_frame(error: &WireError) -> Abort {
    match error {
        WireError::Io(error) => lost(error),
        other => Abort::new(AbortReason::Protocol, other.to_string()),
    }
}
