//! The home volume, as its `bascule-volume` on this node serves it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bascule_ipc::volume::{Request, Response};
use bascule_ipc::{Connection, IpcError, Kind};
use bascule_types::{Change, DiskRow, Epoch, Owner, SavedStateRow, VmUid};
use bascule_volume_gate::GateReader;

/// Longest wait for an answer: longer than `bascule-volume` itself waits for a coordinator.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A client of `volume.sock` for one VM. Threads take turns.
#[derive(Debug)]
pub(crate) struct VolumeClient {
    socket: PathBuf,
    vm: VmUid,
    connection: Mutex<Option<Connection>>,
}

/// What the volume gave this VM.
#[derive(Debug)]
pub(crate) struct Opened {
    /// The device, for reading images and saved states.
    pub(crate) device: Arc<File>,
    /// The gate page, until [`Opened::take_gate`].
    gate: Option<OwnedFd>,
    /// The VM's disks, kernel and initrd.
    pub(crate) disks: Vec<DiskRow>,
    /// Its saved state.
    pub(crate) saved: Option<SavedStateRow>,
}

/// The answer to a writer whose node has re-joined.
#[derive(Debug)]
pub(crate) enum Reopened {
    /// The row is still this VM process's, under the new generation.
    Kept,
    /// It is not, and why.
    Lost(String),
}

impl Opened {
    /// The gate page, mapped.
    pub(crate) fn take_gate(&mut self) -> anyhow::Result<GateReader> {
        let page = self.gate.take().context("the gate was taken already")?;
        GateReader::from_fd(page).context("map the gate page")
    }

    /// The disk called `name`.
    pub(crate) fn disk(&self, name: &str) -> anyhow::Result<&DiskRow> {
        let found = self.disks.iter().find(|row| row.name.as_str() == name);
        found.with_context(|| format!("the volume has no disk {name:?} of this VM"))
    }
}

impl VolumeClient {
    /// A client, not yet connected.
    pub(crate) const fn new(socket: PathBuf, vm: VmUid) -> Self {
        Self {
            socket,
            vm,
            connection: Mutex::new(None),
        }
    }

    /// Becomes the VM's writer in this tenure.
    pub(crate) fn open(&self, owner: Owner, epoch: Epoch) -> anyhow::Result<Opened> {
        let (vm, pid) = (self.vm, std::process::id());
        self.opened(&Request::OpenVm {
            vm,
            owner,
            epoch,
            pid,
        })
    }

    /// Asks whether the row was kept when the node's slot went over to `owner`'s generation.
    pub(crate) fn reopen(&self, owner: Owner, epoch: Epoch) -> anyhow::Result<Reopened> {
        let (vm, pid) = (self.vm, std::process::id());
        match self.call(&Request::OpenVm {
            vm,
            owner,
            epoch,
            pid,
        })? {
            (Response::Opened(_), _) => Ok(Reopened::Kept),
            (Response::Refused(refusal), _) => Ok(Reopened::Lost(refusal.to_string())),
            (other, _) => bail!("the home volume answers {other:?}"),
        }
    }

    /// Looks at the VM's disks without becoming their writer.
    pub(crate) fn peek(&self) -> anyhow::Result<Opened> {
        self.opened(&Request::PeekVm { vm: self.vm })
    }

    /// Every write of this tenure has completed, and there will be no more.
    pub(crate) fn close(&self, owner: Owner, epoch: Epoch) -> anyhow::Result<()> {
        match self.call(&Request::CloseVm {
            vm: self.vm,
            owner,
            epoch,
        })? {
            (Response::Closed, _) => Ok(()),
            (other, _) => bail!("close: the volume answers {other:?}"),
        }
    }

    /// Asks for a metadata change.
    pub(crate) fn change(&self, change: Change) -> Result<Response, IpcError> {
        self.call(&Request::Change(change))
            .map(|(response, _)| response)
    }

    /// Says that a disk failed: nothing more of this node is to be written to the volume.
    pub(crate) fn report_failure(&self, what: &str) -> Result<(), IpcError> {
        self.call(&Request::ReportFailure {
            vm: self.vm,
            what: what.to_owned(),
        })
        .map(drop)
    }

    fn opened(&self, request: &Request) -> anyhow::Result<Opened> {
        let (response, fds) = self.call(request).context("ask the home volume")?;
        let opened = match response {
            Response::Opened(opened) => opened,
            Response::Refused(refusal) => bail!("the home volume refuses: {refusal}"),
            Response::Unavailable { reason } => bail!("the home volume is not available: {reason}"),
            other => bail!("the home volume answers {other:?}"),
        };
        let mut fds = fds.into_iter();
        let (Some(device), Some(gate)) = (fds.next(), fds.next()) else {
            bail!("the home volume sent no device and gate");
        };
        Ok(Opened {
            device: Arc::new(File::from(device)),
            gate: Some(gate),
            disks: opened.disks,
            saved: opened.saved,
        })
    }

    /// One request and its answer, over the present connection or, when `bascule-volume` was
    /// restarted since, over a new one: every request is idempotent.
    fn call(&self, request: &Request) -> Result<(Response, Vec<OwnedFd>), IpcError> {
        let mut slot = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(mut connection) = slot.take() {
            let asked = connection.require(request.since());
            match asked.and_then(|()| connection.call(request)) {
                Ok(answer) => {
                    *slot = Some(connection);
                    return Ok(answer);
                }
                Err(error) if error.kind() == Kind::Gone => {}
                Err(error) => return Err(error),
            }
        }
        let mut connection = Connection::connect(&self.socket, ANSWER_TIMEOUT)?;
        connection.require(request.since())?;
        let answer = connection.call(request)?;
        *slot = Some(connection);
        Ok(answer)
    }
}
