//! The VM's ownership record on its home volume: transferring it and reading it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bascule_ipc::Connection;
use bascule_ipc::volume::{Request, Response};
use bascule_migrate::OwnershipRecord;
use bascule_migrate::commit::{Reply, Transfer, TransferRequest};
use bascule_migrate::source::retry_delay;
use bascule_types::{Answer, Change, Refusal, VmRow, VmUid, VolumeId};

/// Transfers and reads a VM's ownership record.
pub trait OwnershipAuthority: Send {
    /// The volume that holds the record.
    fn volume(&self) -> VolumeId;

    /// Sends the request once. Bounded in time; the same request may be sent again.
    fn request(&mut self, request: &TransferRequest) -> Reply;

    /// Reads the record, through the coordinator.
    fn record(&mut self) -> RecordAnswer;
}

/// The outcome of reading the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordAnswer {
    /// The record as the coordinator read it.
    Record(OwnershipRecord),
    /// The volume has no record of this VM.
    NoRecord,
    /// The volume did not answer.
    NoAnswer,
}

/// A client of `volume.sock` for one VM's ownership record.
#[derive(Debug)]
pub struct OwnershipClient {
    socket: PathBuf,
    vm: VmUid,
    volume: VolumeId,
    connection: Option<Connection>,
}

/// Why the volume's process cannot be used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum OwnershipClientError {
    /// The volume's process does not respond.
    #[error("the volume's process at {socket} does not respond")]
    Ipc {
        socket: PathBuf,
        /// The error of the local socket.
        #[source]
        source: bascule_ipc::IpcError,
    },
    /// Its response is not a status.
    #[error("the volume's process at {socket} did not respond with its status")]
    NoStatus { socket: PathBuf },
}

/// Longest wait for a response. `bascule-volume` repeats a request through elections; when it is slower
/// than this the request is sent again, which is harmless because it is idempotent.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Attempts to get an answer for a change while the guest still runs or could.
const CHANGE_ATTEMPTS: u32 = 8;
/// Shortest pause between two of them.
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(50);

impl OwnershipClient {
    /// Connects to the volume's process.
    ///
    /// # Errors
    /// [`OwnershipClientError`].
    pub fn connect(socket: &Path, vm: VmUid) -> Result<Self, OwnershipClientError> {
        let socket = socket.to_owned();
        let ipc = |source| OwnershipClientError::Ipc {
            socket: socket.clone(),
            source,
        };
        let mut connection = Connection::connect(&socket, RESPONSE_TIMEOUT).map_err(ipc)?;
        let (response, _) = connection.call(&Request::Status).map_err(ipc)?;
        let Response::Status(status) = response else {
            return Err(OwnershipClientError::NoStatus { socket });
        };
        Ok(Self {
            volume: status.volume,
            socket,
            vm,
            connection: Some(connection),
        })
    }

    /// A refusal, with what the record says after it.
    fn refused(&mut self) -> Reply {
        match self.record() {
            RecordAnswer::Record(row) => Reply::Refused(row),
            RecordAnswer::NoRecord => Reply::NoSuchVm,
            RecordAnswer::NoAnswer => Reply::NoAnswer,
        }
    }

    /// One request, over a new connection if the old one is broken; nothing when that fails.
    pub(super) fn call(&mut self, request: &Request) -> Option<Response> {
        if self.connection.is_none() {
            self.connection = Connection::connect(&self.socket, RESPONSE_TIMEOUT).ok();
        }
        let answer = self.connection.as_mut()?.call(request);
        match answer {
            Ok((response, _)) => Some(response),
            Err(error) => {
                tracing::warn!(%error, "the volume's process did not respond");
                self.connection = None;
                None
            }
        }
    }
}

impl OwnershipClient {
    /// Requests an idempotent change until it is answered, at most [`CHANGE_ATTEMPTS`] times.
    ///
    /// # Errors
    /// The refusal, or why there is no answer.
    pub(super) fn request_change(&mut self, change: &Change) -> Result<Answer, String> {
        for attempts in 0..CHANGE_ATTEMPTS {
            match self.call(&Request::Change(change.clone())) {
                Some(Response::Granted(answer)) => return Ok(answer),
                Some(Response::Refused(refusal)) => return Err(refusal.to_string()),
                Some(Response::Unavailable { reason }) => return Err(reason),
                _ => std::thread::sleep(retry_delay(attempts).max(RETRY_PAUSE_MIN)),
            }
        }
        Err("the volume does not respond".to_owned())
    }
}

impl OwnershipAuthority for OwnershipClient {
    fn volume(&self) -> VolumeId {
        self.volume
    }

    fn request(&mut self, request: &TransferRequest) -> Reply {
        let (TransferRequest::Transfer(transfer) | TransferRequest::Retract(transfer)) = *request;
        let Transfer {
            from,
            epoch,
            to,
            attempt,
        } = transfer;
        let change = Change::Transfer {
            vm: self.vm,
            from,
            epoch,
            to,
            attempt,
        };
        match self.call(&Request::Change(change)) {
            Some(Response::Granted(Answer::Row(row))) => Reply::Granted(seen(&row)),
            Some(Response::Refused(Refusal::NoSuchVm)) => Reply::NoSuchVm,
            Some(Response::Refused(refusal)) => {
                tracing::warn!(%refusal, ?request, "the volume refused");
                self.refused()
            }
            Some(Response::Unavailable { reason }) => {
                tracing::warn!(%reason, ?request, "the volume did not pass the request on");
                self.refused()
            }
            _ => Reply::NoAnswer,
        }
    }

    fn record(&mut self) -> RecordAnswer {
        match self.call(&Request::Vm { vm: self.vm }) {
            Some(Response::Vm(Some(found))) => RecordAnswer::Record(seen(&found.row)),
            Some(Response::Vm(None)) => RecordAnswer::NoRecord,
            _ => RecordAnswer::NoAnswer,
        }
    }
}

const fn seen(row: &VmRow) -> OwnershipRecord {
    OwnershipRecord {
        owner: row.owner,
        epoch: row.epoch,
        attempt: row.attempt,
    }
}
