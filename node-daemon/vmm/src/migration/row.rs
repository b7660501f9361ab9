//! The volume's word on who owns the machine.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bascule_ipc::Connection;
use bascule_ipc::volume::{Request, Response};
use bascule_migrate::RowSeen;
use bascule_migrate::commit::{Question, Reply, Transfer};
use bascule_types::{Answer, Change, Refusal, VmRow, VmUid, VolumeId};

/// Whoever can transfer a machine's row, and read it.
pub trait RowAuthority: Send {
    /// The volume on which the row is.
    fn volume(&self) -> VolumeId;

    /// Asks once. Bounded in time; the same question may be asked again.
    fn ask(&mut self, question: &Question) -> Reply;

    /// The row as a coordinator reads it now.
    fn row(&mut self) -> RowAnswer;
}

/// What came back for the wish to read a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowAnswer {
    /// The row.
    Row(RowSeen),
    /// The volume has no such row.
    NoRow,
    /// No answer now.
    NoAnswer,
}

/// A row behind a node's `volume.sock`.
#[derive(Debug)]
pub struct VolumeRow {
    socket: PathBuf,
    vm: VmUid,
    volume: VolumeId,
    connection: Option<Connection>,
}

/// Why there is no way to the row.
#[derive(Debug, thiserror::Error)]
pub enum RowError {
    /// The volume's process does not answer.
    #[error("the volume's process at {socket} does not answer")]
    Ipc {
        /// Its socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: bascule_ipc::IpcError,
    },
    /// It answers with something else than its status.
    #[error("the volume's process at {socket} did not say how it does")]
    NoStatus {
        /// Its socket.
        socket: PathBuf,
    },
}

/// How long one question may take. `bascule-volume` asks through elections by itself; when it is
/// slower than this the question is asked anew, which is harmless.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);

impl VolumeRow {
    /// Connects to the volume's process.
    ///
    /// # Errors
    /// [`RowError`].
    pub fn connect(socket: &Path, vm: VmUid) -> Result<Self, RowError> {
        let socket = socket.to_owned();
        let ipc = |source| RowError::Ipc {
            socket: socket.clone(),
            source,
        };
        let mut connection = Connection::connect(&socket, ASK_TIMEOUT).map_err(ipc)?;
        let (response, _) = connection.call(&Request::Status).map_err(ipc)?;
        let Response::Status(status) = response else {
            return Err(RowError::NoStatus { socket });
        };
        Ok(Self {
            volume: status.volume,
            socket,
            vm,
            connection: Some(connection),
        })
    }

    /// One request, over a new connection if the old one is broken; nothing when that fails.
    pub(super) fn call(&mut self, request: &Request) -> Option<Response> {
        if self.connection.is_none() {
            self.connection = Connection::connect(&self.socket, ASK_TIMEOUT).ok();
        }
        let answer = self.connection.as_mut()?.call(request);
        match answer {
            Ok((response, _)) => Some(response),
            Err(error) => {
                tracing::warn!(%error, "the volume's process did not answer");
                self.connection = None;
                None
            }
        }
    }
}

impl RowAuthority for VolumeRow {
    fn volume(&self) -> VolumeId {
        self.volume
    }

    fn ask(&mut self, question: &Question) -> Reply {
        let (Question::Transfer(transfer) | Question::Retract(transfer)) = *question;
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
                tracing::warn!(%refusal, ?question, "the volume refused");
                match self.row() {
                    RowAnswer::Row(row) => Reply::Refused(row),
                    RowAnswer::NoRow => Reply::NoSuchVm,
                    RowAnswer::NoAnswer => Reply::NoAnswer,
                }
            }
            _ => Reply::NoAnswer,
        }
    }

    fn row(&mut self) -> RowAnswer {
        match self.call(&Request::Rows) {
            Some(Response::Rows(rows)) => rows
                .vms
                .iter()
                .find(|row| row.vm == self.vm)
                .map_or(RowAnswer::NoRow, |row| RowAnswer::Row(seen(row))),
            _ => RowAnswer::NoAnswer,
        }
    }
}

const fn seen(row: &VmRow) -> RowSeen {
    RowSeen {
        owner: row.owner,
        epoch: row.epoch,
        attempt: row.attempt,
    }
}
