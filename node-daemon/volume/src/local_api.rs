//! `volume.sock`: the requests of `bascule-node` and `bascule-vm` processes on this node.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bascule_ipc::volume::{OpenedVm, Request, Response, VmRows};
use bascule_ipc::{Connection, IpcError, Kind};
use bascule_types::{Answer, Bytes, Change, DiskRow, Lba, Ownership, Refusal, VmUid};
use bascule_volume_format::BlockStore;
use bascule_volume_gate::Pace;
use bascule_volume_protocol::WriterId;

use crate::block_device::Identity;
use crate::local_clients::Admitted;
use crate::peer_rpc::{PeerOperation, PeerResponse};
use crate::volume_context::VolumeContext;
use crate::{volume_status, writers};

/// Serves one connection until the client closes it, or requests what it may not.
pub fn serve(context: &VolumeContext, admitted: &Admitted, stream: UnixStream) {
    if let Err(error) = converse(context, admitted, stream)
        && error.kind() != Kind::Gone
    {
        tracing::warn!(%error, "a connection on volume.sock failed");
    }
}

fn converse(
    context: &VolumeContext,
    admitted: &Admitted,
    stream: UnixStream,
) -> Result<(), IpcError> {
    let mut connection = Connection::open(stream, HANDSHAKE_TIMEOUT)?;
    // A client may keep an idle connection open; no timeout between its requests.
    connection.set_timeout(None)?;
    loop {
        let (request, _) = connection.recv::<Request>()?;
        if let Some(reason) = admitted.client.why_refused(&request) {
            admitted.log_refusal(&reason);
            return connection.send(&Response::Unavailable { reason }, &[]);
        }
        let peer = rustix::net::sockopt::socket_peercred(connection.stream());
        let peer = peer
            .ok()
            .and_then(|peer| u32::try_from(peer.pid.as_raw_pid()).ok());
        let (response, mut fds) = answer(context, &request, peer);
        if connection.version() < WRITER_PAGE_SINCE {
            fds.truncate(2);
        }
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        connection.send(&response, &fds)?;
    }
}

/// A response, and the descriptors that come with it.
pub type Reply = (Response, Vec<OwnedFd>);

/// The answer to one request. `peer` is the process id of the client, from SO_PEERCRED. It identifies a writer; without it the
/// `pid` of the request does.
#[must_use]
pub fn answer(context: &VolumeContext, request: &Request, peer: Option<u32>) -> Reply {
    let without_fds = |response| (response, Vec::new());
    match request {
        Request::Status => without_fds(Response::Status(volume_status::status(context))),
        Request::Rows => without_fds(rows(context)),
        Request::Vm { vm } => without_fds(rows_of(context, *vm)),
        Request::Change(change) => without_fds(self::change(context, change)),
        Request::OpenVm {
            vm,
            owner,
            epoch,
            pid,
        } => {
            let ownership = Ownership {
                owner: *owner,
                epoch: *epoch,
            };
            open(context, *vm, peer.unwrap_or(*pid), Some(ownership))
        }
        Request::PeekVm { vm } => open(context, *vm, peer.unwrap_or(0), None),
        Request::CloseVm { vm, .. } => without_fds(close(context, *vm, peer.unwrap_or(0))),
        Request::ReportFailure { vm, what } => {
            // The failure is of that writer alone; the node's others do not notice.
            tracing::error!(%vm, what, "a write of a VM failed");
            report_failure(context, *vm, peer.unwrap_or(0));
            without_fds(Response::Noted)
        }
    }
}

fn rows(context: &VolumeContext) -> Response {
    match context.request_coordinator(&PeerOperation::Rows, timeout(context)) {
        Some(PeerResponse::Rows(rows)) => Response::Rows(rows),
        _ => unavailable(context),
    }
}

fn rows_of(context: &VolumeContext, vm: VmUid) -> Response {
    match context.request_coordinator(&PeerOperation::Vm(vm), timeout(context)) {
        Some(PeerResponse::Vm(found)) => Response::Vm(found),
        _ => unavailable(context),
    }
}

fn change(context: &VolumeContext, change: &Change) -> Response {
    if let Change::Release { vm, .. } = change
        && let Some(reason) = await_drained(context, *vm)
    {
        // A write of the old owner may still land: for example of a killed bascule-vm.
        return Response::Unavailable { reason };
    }
    if let Some(vm) = gives_away(change)
        && let Some(reason) = why_unclean(context, vm)
    {
        return Response::Unavailable { reason };
    }
    let response = ask(context, change);
    match (change, &response) {
        (
            Change::CreateDisk {
                importing: false, ..
            },
            Response::Granted(Answer::Disk(disk)),
        ) if disk.importing => zero_disk(context, disk),
        _ => response,
    }
}

/// The VM that a change prepares to give, or gives, to another slot. A transfer to the same slot is a
/// retraction: its outcome decides whether the guest may run on here.
fn gives_away(change: &Change) -> Option<VmUid> {
    match change {
        Change::Transfer { vm, from, to, .. } if from.slot != to.slot => Some(*vm),
        Change::FinishSavedState { vm, .. } => Some(*vm),
        _ => None,
    }
}

fn why_unclean(context: &VolumeContext, vm: VmUid) -> Option<String> {
    context.update(|state| {
        state.writers.read_pages();
        state.writers.why_unclean(vm)
    })
}

/// Waits while dead writers of this VM complete, for a bounded time. Why not every write of this VM
/// has completed; none when every one has.
fn await_drained(context: &VolumeContext, vm: VmUid) -> Option<String> {
    let patience = context.superblock.timings.settle + timeout(context);
    // One that has just ended is not refused as one that writes: the writers thread looks once a second.
    drop(writers::note_dead(context));
    context.wait_until(patience, |state| {
        state.writers.is_drained(vm) || !state.writers.is_completing(vm) || state.stopping
    });
    context.state().writers.why_not_drained(vm)
}

fn ask(context: &VolumeContext, change: &Change) -> Response {
    match context.request_coordinator(&PeerOperation::Change(change.clone()), timeout(context)) {
        Some(PeerResponse::Granted(answer)) => Response::Granted(answer),
        Some(PeerResponse::Refused(refusal)) => Response::Refused(refusal),
        _ => Response::Unknown,
    }
}

/// Zeroes a new disk and finishes its import. Only one thread zeroes disks at a time: a second one
/// could still write zeroes after the first has made the disk available to its VM.
fn zero_disk(context: &VolumeContext, disk: &DiskRow) -> Response {
    let _zeroing = context.zeroing.lock();
    // Another thread may have finished the disk meanwhile: ask the coordinator again.
    let current = ask(context, &create_again(disk));
    let Response::Granted(Answer::Disk(disk)) = current else {
        return current;
    };
    if !disk.importing {
        return Response::Granted(Answer::Disk(disk));
    }
    // This process counts as a writer meanwhile: if it freezes here, the node must be reset before
    // the extents go to another VM.
    let vm = disk.vm.unwrap_or(VmUid::from_bytes([0; 16]));
    let me = match context.writer(vm, std::process::id()) {
        Ok(me) => me,
        Err(error) => {
            let reason = format!("cannot zero disk {}: {error}", disk.name);
            return Response::Unavailable { reason };
        }
    };
    if let Err(reason) = writers::open(context, me, context.device.identity(), true) {
        return Response::Unavailable { reason };
    }
    let zeroed = zero_extents(context, &disk);
    if zeroed.is_err() {
        // What was to be zeroes may land on what the disk's VM writes later.
        fail(context, me);
    }
    if let Err(error) = writers::close(context, me) {
        tracing::warn!(%error, "the writer of zeroes cannot close");
    }
    match zeroed {
        Ok(true) => ask(
            context,
            &Change::FinishImport {
                disk: disk.disk,
                length: None,
            },
        ),
        // The lease expired: the client retries.
        Ok(false) => Response::Unknown,
        Err(error) => Response::Unavailable {
            reason: format!("cannot zero disk {}: {error}", disk.name),
        },
    }
}

fn create_again(disk: &DiskRow) -> Change {
    Change::CreateDisk {
        vm: disk.vm.unwrap_or(VmUid::from_bytes([0; 16])),
        name: disk.name.clone(),
        size: disk.size,
        role: disk.role,
        importing: true,
    }
}

/// Zeroes the extents of a disk, [`ZERO_BYTES`] at a time, and flushes. The lease is checked before
/// each step; false when this node may no longer write.
fn zero_extents(context: &VolumeContext, disk: &DiskRow) -> std::io::Result<bool> {
    let mut pace = Pace::default();
    for run in &disk.extents {
        let mut done = 0;
        while done < run.length.0 {
            let length = pace.piece(run.length.0 - done);
            let now = context.now();
            let may_write = {
                let state = context.state();
                state.is_open(now) && state.joined == disk.importer
            };
            if !may_write {
                return Ok(false);
            }
            let start = Lba(run.start.0 + done / BLOCK);
            context.device.zero(start, Bytes(length))?;
            pace.took(length, context.now().since(now));
            done += length;
        }
    }
    context.device.handle().flush()?;
    Ok(true)
}

/// Hands out the VM's row and disks, the device and the gate page; without `ownership` for reading
/// only. The writer is recorded before the row is read, so that a concurrent release sees it.
fn open(context: &VolumeContext, vm: VmUid, pid: u32, ownership: Option<Ownership>) -> Reply {
    match try_open(context, vm, pid, ownership) {
        Ok((opened, fds)) => (Response::Opened(opened), fds),
        Err(why) => (why.into(), Vec::new()),
    }
}

fn try_open(
    context: &VolumeContext,
    vm: VmUid,
    pid: u32,
    ownership: Option<Ownership>,
) -> Result<(OpenedVm, Vec<OwnedFd>), NotOpened> {
    let unavailable = |what: &str, error: std::io::Error| {
        NotOpened::Unavailable(format!("cannot pass the device: {what}: {error}"))
    };
    let writer = context
        .writer(vm, pid)
        .map_err(|error| unavailable("identify the client", error))?;
    // A reader too: a migration's destination writes through the device that it got before it owned
    // the VM.
    let device = context.device.open_for(writer);
    let (device, identity) = device.map_err(|error| unavailable("open and lock it", error))?;
    let gate = context.gate.reader_fd();
    let gate = gate
        .map_err(|error| NotOpened::Unavailable(format!("cannot pass the gate page: {error}")))?;
    let page = context.update(|state| state.writers.page(writer));
    let page = page.map_err(|error| unavailable("make its writer page", error))?;
    let is_new = match ownership {
        Some(_) => admit(context, writer, identity)?,
        None => false,
    };
    let opened = look_up(context, vm, ownership);
    if opened.is_err() && is_new {
        unrecord(context, writer);
    }
    Ok((opened?, vec![device, gate, page]))
}

/// Records a writer, once no write of an earlier one of its VM can land any more. Whether it is new.
fn admit(context: &VolumeContext, writer: WriterId, device: Identity) -> Result<bool, NotOpened> {
    let earlier = context.update(|state| {
        state.writers.read_pages();
        state.writers.why_not_opened(writer, false)
    });
    let shared = match earlier {
        Some(_) => {
            let opened = look_up(context, writer.vm, None)?;
            opened.disks.iter().any(|disk| disk.importing)
        }
        None => false,
    };
    let timings = &context.superblock.timings;
    writers::await_earlier(context, writer, shared, timings.settle + timings.lease);
    writers::open(context, writer, device, shared).map_err(NotOpened::Unavailable)
}

/// Removes a writer that did not get the device after all.
fn unrecord(context: &VolumeContext, writer: WriterId) {
    if let Err(error) = writers::close(context, writer) {
        tracing::warn!(?writer, %error, "cannot remove the record of a writer");
    }
}

/// Why a VM was not opened.
enum NotOpened {
    Refused(Refusal),
    Unavailable(String),
}

impl From<NotOpened> for Response {
    fn from(why: NotOpened) -> Self {
        match why {
            NotOpened::Refused(refusal) => Self::Refused(refusal),
            NotOpened::Unavailable(reason) => Self::Unavailable { reason },
        }
    }
}

fn look_up(
    context: &VolumeContext,
    vm: VmUid,
    ownership: Option<Ownership>,
) -> Result<OpenedVm, NotOpened> {
    let refused = |refusal| Err(NotOpened::Refused(refusal));
    let Some(PeerResponse::Vm(found)) =
        context.request_coordinator(&PeerOperation::Vm(vm), timeout(context))
    else {
        return Err(NotOpened::Unavailable(unavailable_reason(context)));
    };
    // Disks whose import is not finished too: the client may be their importer.
    let Some(VmRows { row, disks, saved }) = found else {
        return refused(Refusal::NoSuchVm);
    };
    if let Some(Ownership { owner, epoch }) = ownership {
        match row.owner {
            Some(now) if now == owner && row.epoch == epoch => {}
            Some(owner) => {
                let epoch = row.epoch;
                return refused(Refusal::OwnedBy { owner, epoch });
            }
            None => return refused(Refusal::EpochIs { epoch: row.epoch }),
        }
        if context.state().joined != Some(owner) {
            return refused(Refusal::StaleOwner { owner });
        }
    }
    let settle = context.superblock.timings.settle;
    Ok(OpenedVm {
        row,
        disks,
        saved,
        block_bytes: context.device.block_bytes(),
        settle_ms: u64::try_from(settle.as_millis()).ok(),
    })
}

fn close(context: &VolumeContext, vm: VmUid, pid: u32) -> Response {
    closed(
        context
            .writer(vm, pid)
            .and_then(|writer| writers::close(context, writer)),
    )
}

fn closed(closed: std::io::Result<()>) -> Response {
    match closed {
        Ok(()) => Response::Closed,
        Err(error) => Response::Unavailable {
            reason: format!("the writer cannot close: {error}"),
        },
    }
}

fn report_failure(context: &VolumeContext, vm: VmUid, pid: u32) {
    match context.writer(vm, pid) {
        Ok(writer) => fail(context, writer),
        Err(error) => tracing::warn!(%vm, pid, %error, "an unknown process reports a failed disk"),
    }
}

fn fail(context: &VolumeContext, writer: WriterId) {
    if let Err(error) = context.update(|state| state.writers.fail(writer)) {
        tracing::error!(%error, "cannot record that a writer is unclean");
    }
}

fn unavailable(context: &VolumeContext) -> Response {
    let reason = unavailable_reason(context);
    Response::Unavailable { reason }
}

fn unavailable_reason(context: &VolumeContext) -> String {
    let reason = volume_status::reason(&context.state(), context.now());
    reason.unwrap_or_else(|| "no coordinator answers".to_owned())
}

/// How long a request waits for a coordinator: one whose heartbeat stops is replaced within the
/// watch time and an election.
fn timeout(context: &VolumeContext) -> Duration {
    let timings = &context.superblock.timings;
    timings.watch + timings.lease
}

/// The protocol version whose clients expect a third descriptor.
const WRITER_PAGE_SINCE: u32 = 3;
/// For the handshake of a new connection.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
const BLOCK: u64 = bascule_volume_format::BLOCK_BYTES_U64;
