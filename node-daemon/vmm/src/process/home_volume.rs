//! The client of the VM's home volume, which this node's `bascule-volume` serves on `volume.sock`.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bascule_devices::disk::SETTLE_DEFAULT;
use bascule_ipc::volume::{Request, Response};
use bascule_ipc::{Connection, IpcError, Kind};
use bascule_types::{Change, DiskRow, Ownership, SavedStateRow, VmUid};
use bascule_volume_gate::{GateReader, WriterPage};

use crate::migration::OwnershipClient;

/// Longest wait for a response: longer than `bascule-volume` itself waits for a coordinator.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A client of `volume.sock` for one VM. One request at a time; other threads wait.
#[derive(Debug)]
pub(crate) struct VolumeClient {
    socket: PathBuf,
    vm: VmUid,
    connection: Mutex<Option<Connection>>,
}

/// What the volume passes when it is opened.
#[derive(Debug)]
pub(crate) struct Opened {
    /// The device that holds the VM's extents.
    pub(crate) device: Arc<File>,
    /// The gate page, until [`Opened::take_gate`].
    gate: Option<OwnedFd>,
    /// This process's writer page, until [`Opened::take_writer_page`].
    writer_page: Option<OwnedFd>,
    /// The VM's disks, kernel and initrd.
    pub(crate) disks: Vec<DiskRow>,
    pub(crate) saved: Option<SavedStateRow>,
    /// For how long a write that failed may still land.
    pub(crate) settle: Duration,
}

/// Whether the ownership outlived the re-join of its node.
#[derive(Debug)]
pub(crate) enum Reopened {
    /// This process still owns the VM, under the new generation.
    Kept,
    /// It does not, for this reason.
    Lost(String),
}

/// Why a VM without a home volume is not migrated.
pub(super) const NO_HOME: &str =
    "the VM has no home volume: only the ownership record there says on which side it may run";

/// Why a VM with a failed write is not migrated.
pub(super) const UNCLEAN: &str = "a disk write failed and may still land: the VM stays on this node until the node was restarted, \
     or is confirmed to be fenced";

/// A client for the ownership record of `vm`.
pub(super) fn ownership_client(socket: &Path, vm: VmUid) -> Result<OwnershipClient, String> {
    OwnershipClient::connect(socket, vm)
        .map_err(|error| format!("{:#}", anyhow::Error::from(error)))
}

impl Opened {
    /// The gate page, mapped.
    pub(crate) fn take_gate(&mut self) -> anyhow::Result<GateReader> {
        let page = self.gate.take().context("the gate was taken already")?;
        GateReader::from_fd(page).context("map the gate page")
    }

    /// The page in which this process says what it has under way; none from a `bascule-volume` of an
    /// earlier release.
    pub(crate) fn take_writer_page(&mut self) -> anyhow::Result<Option<WriterPage>> {
        let page = self.writer_page.take().map(WriterPage::attach);
        page.transpose().context("map the writer page")
    }

    /// The disk called `name`.
    pub(crate) fn disk(&self, name: &str) -> anyhow::Result<&DiskRow> {
        disk(&self.disks, name)
    }
}

/// The disk called `name` among `disks`.
pub(super) fn disk<'a>(disks: &'a [DiskRow], name: &str) -> anyhow::Result<&'a DiskRow> {
    let found = disks.iter().find(|row| row.name.as_str() == name);
    found.with_context(|| format!("the volume has no disk {name:?} of this VM"))
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

    /// Opens the VM's disks for writing in this ownership.
    pub(crate) fn open(&self, ownership: Ownership) -> anyhow::Result<Opened> {
        let Ownership { owner, epoch } = ownership;
        let (vm, pid) = (self.vm, std::process::id());
        self.opened(&Request::OpenVm {
            vm,
            owner,
            epoch,
            pid,
        })
    }

    /// Opens the VM's disks again after the node joined the volume in the generation of `ownership`.
    pub(crate) fn reopen(&self, ownership: Ownership) -> anyhow::Result<Reopened> {
        let Ownership { owner, epoch } = ownership;
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

    /// Opens the VM's disks for reading only.
    pub(crate) fn peek(&self) -> anyhow::Result<Opened> {
        self.opened(&Request::PeekVm { vm: self.vm })
    }

    /// Reports that every write of this ownership has completed and that there will be no more.
    pub(crate) fn close(&self, ownership: Ownership) -> anyhow::Result<()> {
        match self.call(&Request::CloseVm {
            vm: self.vm,
            owner: ownership.owner,
            epoch: ownership.epoch,
        })? {
            (Response::Closed, _) => Ok(()),
            (other, _) => bail!("close: the volume answers {other:?}"),
        }
    }

    /// Requests a metadata change.
    pub(crate) fn change(&self, change: Change) -> Result<Response, IpcError> {
        self.call(&Request::Change(change))
            .map(|(response, _)| response)
    }

    /// Reports a failed disk: this node must not write to the volume any more.
    pub(crate) fn report_failure(&self, what: &str) -> Result<(), IpcError> {
        self.call(&Request::ReportFailure {
            vm: self.vm,
            what: what.to_owned(),
        })
        .map(drop)
    }

    fn opened(&self, request: &Request) -> anyhow::Result<Opened> {
        let (response, fds) = self.call(request).context("open the home volume")?;
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
            writer_page: fds.next(),
            disks: opened.disks,
            saved: opened.saved,
            settle: opened
                .settle_ms
                .map_or(SETTLE_DEFAULT, Duration::from_millis),
        })
    }

    /// Sends one request over the present connection or, when `bascule-volume` was restarted since,
    /// over a new one. Every request is idempotent.
    fn call(&self, request: &Request) -> Result<(Response, Vec<OwnedFd>), IpcError> {
        let mut slot = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(mut connection) = slot.take() {
            let known = connection.require(request.since());
            match known.and_then(|()| connection.call(request)) {
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
