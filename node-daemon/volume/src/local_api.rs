//! `volume.sock`: the requests of `bascule-node` and `bascule-vm` processes on this node.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bascule_ipc::volume::{OpenedVm, Request, Response};
use bascule_ipc::{Connection, IpcError, Kind};
use bascule_types::{Answer, Bytes, Change, DiskRow, Lba, Ownership, Refusal, VmUid};
use bascule_volume_format::BlockStore;
use bascule_volume_gate::boot_time_now;

use crate::peer_rpc::{PeerOperation, PeerResponse};
use crate::volume_context::VolumeContext;
use crate::{volume_status, writers};

/// Serves one connection until the client closes it.
pub fn serve(context: &VolumeContext, stream: UnixStream) {
    if let Err(error) = converse(context, stream)
        && error.kind() != Kind::Gone
    {
        tracing::warn!(%error, "a connection on volume.sock failed");
    }
}

fn converse(context: &VolumeContext, stream: UnixStream) -> Result<(), IpcError> {
    let mut connection = Connection::open(stream, HANDSHAKE_TIMEOUT)?;
    // A client may keep an idle connection open; no timeout between its requests.
    connection.set_timeout(None)?;
    loop {
        let (request, _) = connection.recv::<Request>()?;
        let peer = rustix::net::sockopt::socket_peercred(connection.stream());
        let peer = peer
            .ok()
            .and_then(|peer| u32::try_from(peer.pid.as_raw_pid()).ok());
        let (response, fds) = answer(context, &request, peer);
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        connection.send(&response, &fds)?;
    }
}

type Reply = (Response, Vec<OwnedFd>);

/// `peer` is the process id of the client, from SO_PEERCRED. It identifies a writer; without it the
/// `pid` of the request does.
fn answer(context: &VolumeContext, request: &Request, peer: Option<u32>) -> Reply {
    let without_fds = |response| (response, Vec::new());
    match request {
        Request::Status => without_fds(Response::Status(volume_status::status(context))),
        Request::Rows => without_fds(rows(context)),
        Request::Change(change) => without_fds(self::change(context, change)),
        Request::OpenVm {
            vm,
            owner,
            epoch,
            pid,
        } => {
            let writer = Writer {
                ownership: Ownership {
                    owner: *owner,
                    epoch: *epoch,
                },
                pid: peer.unwrap_or(*pid),
            };
            open(context, *vm, Some(writer))
        }
        Request::PeekVm { vm } => open(context, *vm, None),
        Request::CloseVm { vm, .. } => without_fds(close(context, *vm, peer.unwrap_or(0))),
        Request::ReportFailure { what, .. } => {
            // A failed flush does not tell whose writes were lost: every writer of this node stops.
            context.fail(what);
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

fn change(context: &VolumeContext, change: &Change) -> Response {
    if let Change::Release { vm, .. } = change
        && !drained(context, *vm)
    {
        // A write of the old owner may still land: for example of a killed bascule-vm.
        let reason = "a process of this VM has not closed its gate, or has writes in flight";
        return Response::Unavailable {
            reason: reason.to_owned(),
        };
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

/// Whether every write of this VM has completed. Waits for the settle time of a writer that died,
/// and returns at once while a live writer holds the VM.
fn drained(context: &VolumeContext, vm: VmUid) -> bool {
    let settled = context.superblock.timings.settle + timeout(context);
    context.wait_until(settled, |state| {
        state.writers.is_drained(vm) || state.writers.is_held(vm) || state.stopping
    });
    context.state().writers.is_drained(vm)
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
    if let Err(reason) = writers::open(context, vm, std::process::id()) {
        return Response::Unavailable { reason };
    }
    let zeroed = zero_extents(context, &disk);
    close(context, vm, std::process::id());
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
    for run in &disk.extents {
        let mut done = 0;
        while done < run.length.0 {
            let length = ZERO_BYTES.min(run.length.0 - done);
            let now = boot_time_now();
            let may_write = {
                let state = context.state();
                state.is_open(now) && state.joined == disk.importer
            };
            if !may_write {
                return Ok(false);
            }
            let start = Lba(run.start.0 + done / BLOCK);
            context.device.zero(start, Bytes(length))?;
            done += length;
        }
    }
    context.device.handle().flush()?;
    Ok(true)
}

/// A process that requests the device in order to write a VM's disks.
#[derive(Clone, Copy)]
struct Writer {
    ownership: Ownership,
    pid: u32,
}

/// Hands out the VM's row and disks, the device and the gate page; without `writer` for reading
/// only. The writer is recorded before the row is read, so that a concurrent release sees it.
fn open(context: &VolumeContext, vm: VmUid, writer: Option<Writer>) -> Reply {
    let mut is_new = false;
    if let Some(writer) = writer {
        match writers::open(context, vm, writer.pid) {
            Ok(opened) => is_new = opened,
            Err(reason) => return (Response::Unavailable { reason }, Vec::new()),
        }
    }
    let opened = look_up(context, vm, writer.map(|writer| writer.ownership))
        .and_then(|opened| Ok((opened, descriptors(context)?)));
    match opened {
        Ok((opened, fds)) => (Response::Opened(opened), fds),
        Err(why) => {
            if let Some(writer) = writer.filter(|_| is_new) {
                close(context, vm, writer.pid);
            }
            (why.into(), Vec::new())
        }
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
    let Some(PeerResponse::Rows(found)) =
        context.request_coordinator(&PeerOperation::Rows, timeout(context))
    else {
        return Err(NotOpened::Unavailable(unavailable_reason(context)));
    };
    let Some(row) = found.vms.into_iter().find(|row| row.vm == vm) else {
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
    // Disks whose import is not finished too: the client may be their importer.
    let mine = |disk: &DiskRow| disk.vm == Some(vm);
    Ok(OpenedVm {
        row,
        disks: found.disks.into_iter().filter(mine).collect(),
        saved: found.saved.into_iter().find(|saved| saved.vm == vm),
        block_bytes: context.device.block_bytes(),
    })
}

fn descriptors(context: &VolumeContext) -> Result<Vec<OwnedFd>, NotOpened> {
    let unavailable = |what: String| NotOpened::Unavailable(format!("cannot pass {what}"));
    let device = context.device.descriptor();
    let device = device.map_err(|error| unavailable(format!("the device: {error}")))?;
    let gate = context.gate.reader_fd();
    let gate = gate.map_err(|error| unavailable(format!("the gate page: {error}")))?;
    Ok(vec![device, gate])
}

fn close(context: &VolumeContext, vm: VmUid, pid: u32) -> Response {
    match writers::close(context, vm, pid) {
        Ok(()) => Response::Closed,
        Err(error) => Response::Unavailable {
            reason: format!("cannot record that the writer closed: {error}"),
        },
    }
}

fn unavailable(context: &VolumeContext) -> Response {
    let reason = unavailable_reason(context);
    Response::Unavailable { reason }
}

fn unavailable_reason(context: &VolumeContext) -> String {
    let reason = volume_status::reason(&context.state(), boot_time_now());
    reason.unwrap_or_else(|| "no coordinator answers".to_owned())
}

/// How long a request waits for a coordinator: one whose heartbeat stops is replaced within the
/// watch time and an election.
fn timeout(context: &VolumeContext) -> Duration {
    let timings = &context.superblock.timings;
    timings.watch + timings.lease
}

/// For the handshake of a new connection.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
const BLOCK: u64 = bascule_volume_format::BLOCK_BYTES_U64;
/// Small enough that the lease is checked several times a second.
const ZERO_BYTES: u64 = 4 << 20;
