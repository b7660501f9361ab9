//! Frames over a unix stream socket: a length word, one JSON document, and file descriptors.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Hello;

/// The longest JSON document in bytes. A disk of 16 TiB in scattered runs of 1 GiB needs a tenth.
pub const FRAME_BYTES_MAX: usize = 8 << 20;
/// The most file descriptors in one frame. [`crate::volume::Response::Opened`] sends two.
pub const FRAME_FDS_MAX: usize = 8;

/// One end of a local connection whose [`Hello`]s have been exchanged.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    version: u32,
}

/// A failure on a local connection, which cannot be used any further.
#[derive(Debug, thiserror::Error)]
pub enum IpcError {
    /// The peer closed the connection between two frames.
    #[error("the peer closed the connection")]
    Closed,
    /// The socket failed or timed out.
    #[error("local socket: {what}")]
    Io {
        /// The failed operation.
        what: &'static str,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
    /// The peer announced a frame longer than [`FRAME_BYTES_MAX`].
    #[error("a frame of {length} bytes exceeds the limit of {FRAME_BYTES_MAX}")]
    TooLong {
        /// The announced length in bytes.
        length: usize,
    },
    /// The document is not of the expected shape.
    #[error("a malformed message")]
    Malformed(#[source] serde_json::Error),
    /// No common protocol version.
    #[error("no common protocol version: ours {ours:?}, theirs {theirs:?}")]
    Version {
        /// The versions that this side speaks.
        ours: Hello,
        /// The versions that the peer speaks.
        theirs: Hello,
    },
}

/// The class of an [`IpcError`], by which a caller decides whether to retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The peer does not listen, or closed the connection: a retry may help.
    Gone,
    /// No answer within the time limit.
    TimedOut,
    /// The peer does not speak this protocol: a retry does not help.
    Protocol,
}

impl IpcError {
    /// The class of this error.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Closed => Kind::Gone,
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Kind::TimedOut,
                _ => Kind::Gone,
            },
            Self::TooLong { .. } | Self::Malformed(_) | Self::Version { .. } => Kind::Protocol,
        }
    }
}

impl Connection {
    /// Connects to a server's socket and exchanges hellos, all within `timeout` per step.
    ///
    /// # Errors
    /// Any [`IpcError`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, IpcError> {
        let stream = UnixStream::connect(path).map_err(io_error("connect"))?;
        Self::open(stream, timeout)
    }

    /// Exchanges hellos on a connected or accepted stream. Both sides send first and then read.
    ///
    /// # Errors
    /// Any [`IpcError`].
    pub fn open(stream: UnixStream, timeout: Duration) -> Result<Self, IpcError> {
        let mut connection = Self { stream, version: 0 };
        connection.set_timeout(Some(timeout))?;
        connection.send(&Hello::THIS, &[])?;
        let (theirs, _) = connection.recv::<Hello>()?;
        connection.version = Hello::THIS.agree(theirs)?;
        Ok(connection)
    }

    /// The protocol version that both sides speak.
    #[must_use]
    pub const fn version(&self) -> u32 {
        self.version
    }

    /// Checks that the peer speaks at least `version`.
    ///
    /// # Errors
    /// [`IpcError::Version`].
    pub const fn require(&self, version: u32) -> Result<(), IpcError> {
        if self.version >= version {
            return Ok(());
        }
        let agreed = Hello {
            version: self.version,
            version_min: self.version,
        };
        let needed = Hello {
            version,
            version_min: version,
        };
        Err(IpcError::Version {
            ours: needed,
            theirs: agreed,
        })
    }

    /// Bounds each later send and receive; `None` waits without a limit (a server between two
    /// requests).
    ///
    /// # Errors
    /// [`IpcError::Io`].
    pub fn set_timeout(&self, timeout: Option<Duration>) -> Result<(), IpcError> {
        self.stream
            .set_read_timeout(timeout)
            .map_err(io_error("set read timeout"))?;
        self.stream
            .set_write_timeout(timeout)
            .map_err(io_error("set write timeout"))
    }

    /// Sends one message and awaits its answer.
    ///
    /// # Errors
    /// Any [`IpcError`].
    pub fn call<Q: Serialize, A: DeserializeOwned>(
        &mut self,
        request: &Q,
    ) -> Result<(A, Vec<OwnedFd>), IpcError> {
        self.send(request, &[])?;
        self.recv()
    }

    /// Sends one message, with file descriptors.
    ///
    /// # Errors
    /// [`IpcError::TooLong`] before anything is sent; [`IpcError::Io`].
    pub fn send<T: Serialize>(
        &mut self,
        message: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), IpcError> {
        let body = serde_json::to_vec(message).map_err(IpcError::Malformed)?;
        let length = match u32::try_from(body.len()) {
            Ok(length) if body.len() <= FRAME_BYTES_MAX && fds.len() <= FRAME_FDS_MAX => length,
            _ => return Err(IpcError::TooLong { length: body.len() }),
        };
        self.send_head(length.to_le_bytes(), fds)?;
        self.stream.write_all(&body).map_err(io_error("send"))
    }

    /// Receives one message, with the file descriptors that came along.
    ///
    /// # Errors
    /// [`IpcError::Closed`] at the end of the stream; any other [`IpcError`].
    pub fn recv<T: DeserializeOwned>(&mut self) -> Result<(T, Vec<OwnedFd>), IpcError> {
        let (head, fds) = self.recv_head()?;
        let length = u32::from_le_bytes(head) as usize;
        if length > FRAME_BYTES_MAX {
            return Err(IpcError::TooLong { length });
        }
        let mut body = Vec::new();
        let read = (&mut self.stream)
            .take(length as u64)
            .read_to_end(&mut body)
            .map_err(io_error("receive"))?;
        if read < length {
            return Err(IpcError::Closed);
        }
        serde_json::from_slice(&body)
            .map(|message| (message, fds))
            .map_err(IpcError::Malformed)
    }

    /// The socket, for waiting on it together with others.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn send_head(&mut self, head: [u8; 4], fds: &[BorrowedFd<'_>]) -> Result<(), IpcError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FRAME_FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let sent = rustix::io::retry_on_intr(|| {
            sendmsg(
                self.stream.as_fd(),
                &[IoSlice::new(&head)],
                &mut control,
                SendFlags::NOSIGNAL,
            )
        })
        .map_err(|errno| io_error("send")(errno.into()))?;
        self.stream
            .write_all(head.get(sent..).unwrap_or_default())
            .map_err(io_error("send"))
    }

    fn recv_head(&mut self) -> Result<([u8; 4], Vec<OwnedFd>), IpcError> {
        let mut head = [0; 4];
        let mut fds = Vec::new();
        let mut filled = 0;
        while filled < head.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FRAME_FDS_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let room = head.get_mut(filled..).unwrap_or_default();
            let received = rustix::io::retry_on_intr(|| {
                recvmsg(
                    self.stream.as_fd(),
                    &mut [IoSliceMut::new(room)],
                    &mut control,
                    RecvFlags::CMSG_CLOEXEC,
                )
            })
            .map_err(|errno| io_error("receive")(errno.into()))?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
            if received.bytes == 0 {
                return Err(IpcError::Closed);
            }
            filled += received.bytes;
        }
        Ok((head, fds))
    }
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> IpcError {
    move |source| IpcError::Io { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom};

    const SHORT: Duration = Duration::from_secs(5);

    fn pair() -> (Connection, Connection) {
        let (a, b) = UnixStream::pair().unwrap();
        let other = std::thread::Builder::new()
            .name("ipc-peer".into())
            .spawn(move || Connection::open(b, SHORT).unwrap())
            .unwrap();
        (Connection::open(a, SHORT).unwrap(), other.join().unwrap())
    }

    #[test]
    fn a_message_and_its_file_descriptor_arrive_together() {
        let (mut a, mut b) = pair();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"page").unwrap();
        a.send(&vec!["one", "two"], &[file.as_fd()]).unwrap();
        let (message, fds): (Vec<String>, _) = b.recv().unwrap();
        assert_eq!(message, ["one", "two"]);
        let mut same = std::fs::File::from(fds.into_iter().next().unwrap());
        let mut text = String::new();
        same.seek(SeekFrom::Start(0)).unwrap();
        same.read_to_string(&mut text).unwrap();
        assert_eq!(text, "page");
    }

    #[test]
    fn the_first_bytes_on_the_wire_are_these() {
        let (a, mut b) = UnixStream::pair().unwrap();
        drop(
            Connection {
                stream: a,
                version: 0,
            }
            .send(&Hello::THIS, &[]),
        );
        let mut bytes = Vec::new();
        b.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"\x1d\0\0\0{\"version\":6,\"version_min\":1}");
    }

    #[test]
    fn an_announced_length_beyond_the_limit_is_refused_before_it_is_read() {
        let (a, mut b) = pair();
        (&a.stream).write_all(&u32::MAX.to_le_bytes()).unwrap();
        let error = b.recv::<Hello>().unwrap_err();
        assert!(matches!(error, IpcError::TooLong { .. }), "{error}");
        assert_eq!(error.kind(), Kind::Protocol);
    }

    #[test]
    fn garbage_is_a_protocol_error_and_a_closed_peer_is_gone() {
        let (a, mut b) = pair();
        (&a.stream).write_all(b"\x02\0\0\0{]").unwrap();
        assert_eq!(b.recv::<Hello>().unwrap_err().kind(), Kind::Protocol);
        drop(a);
        assert_eq!(b.recv::<Hello>().unwrap_err().kind(), Kind::Gone);
    }

    #[test]
    fn a_request_that_is_newer_than_the_peer_is_refused_before_it_is_sent() {
        let (mut ours, peer) = pair();
        ours.require(2).unwrap();
        ours.version = 1;
        let error = ours.require(2).unwrap_err();
        assert_eq!(error.kind(), Kind::Protocol);
        drop(ours);
        let mut rest = Vec::new();
        (&peer.stream).read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty());
    }

    #[test]
    fn a_peer_from_an_incompatible_release_is_refused() {
        let newer = Hello {
            version: 9,
            version_min: 7,
        };
        assert!(matches!(
            Hello::THIS.agree(newer),
            Err(IpcError::Version { .. })
        ));
        let next = Hello {
            version: 7,
            version_min: 1,
        };
        assert_eq!(Hello::THIS.agree(next).unwrap(), 6);
        let before = Hello {
            version: 1,
            version_min: 1,
        };
        assert_eq!(Hello::THIS.agree(before).unwrap(), 1);
    }
}
