//! `volume.sock`: what `bascule-node` and `bascule-vm` ask of this process.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bascule_ipc::volume::{OpenedVm, Request, Response};
use bascule_ipc::{Connection, IpcError, Kind};
use bascule_types::{Answer, Bytes, Change, DiskRow, Epoch, Lba, Owner, Refusal, VmUid};
use bascule_volume_format::{BlockStore, WatchdogKind};
use bascule_volume_gate::boot_time_now;

use crate::minder;
use crate::node::Node;
use crate::peer::{Ask, PeerResponse};
use crate::status;

/// Serves one local connection until the peer closes it.
pub fn serve(node: &Node, stream: UnixStream) {
    if let Err(error) = converse(node, stream)
        && error.kind() != Kind::Gone
    {
        tracing::warn!(%error, "a local connection");
    }
}

fn converse(node: &Node, stream: UnixStream) -> Result<(), IpcError> {
    let mut connection = Connection::open(stream, STEP)?;
    // A client may keep its connection for as long as it likes; what it sends, it sends at once.
    connection.set_timeout(None)?;
    loop {
        let (request, _) = connection.recv::<Request>()?;
        let peer = rustix::net::sockopt::socket_peercred(connection.stream());
        let peer = peer
            .ok()
            .and_then(|peer| u32::try_from(peer.pid.as_raw_pid()).ok());
        let (response, fds) = answer(node, &request, peer);
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        connection.send(&response, &fds)?;
    }
}

type Answered = (Response, Vec<OwnedFd>);

/// `peer` is the asking process, as the kernel says; a writer is known by it.
fn answer(node: &Node, request: &Request, peer: Option<u32>) -> Answered {
    let alone = |response| (response, Vec::new());
    match request {
        Request::Status => alone(Response::Status(status::status(node))),
        Request::Rows => alone(rows(node)),
        Request::Change(change) => alone(self::change(node, change)),
        Request::OpenVm {
            vm,
            owner,
            epoch,
            pid,
        } => open(node, *vm, Some((*owner, *epoch, peer.unwrap_or(*pid)))),
        Request::PeekVm { vm } => open(node, *vm, None),
        Request::CloseVm { vm, .. } => alone(close(node, *vm, peer.unwrap_or(0))),
        Request::ReportFailure { what, .. } => {
            // What the other VMs of this node wrote may be lost too, and nobody can tell.
            node.fail(what);
            alone(Response::Noted)
        }
    }
}

fn rows(node: &Node) -> Response {
    match node.ask(&Ask::Rows, limit(node)) {
        Some(PeerResponse::Rows(rows)) => Response::Rows(rows),
        _ => unavailable(node),
    }
}

fn change(node: &Node, change: &Change) -> Response {
    if let Change::Release { vm, .. } = change
        && !drained(node, *vm)
    {
        // A killed bascule-vm or a timed-out write is no clean release.
        let reason = "a process of this VM has not closed its gate, or has writes in flight";
        return Response::Unavailable {
            reason: reason.to_owned(),
        };
    }
    let response = ask(node, change);
    match (change, &response) {
        (
            Change::CreateDisk {
                importing: false, ..
            },
            Response::Granted(Answer::Disk(disk)),
        ) if disk.importing => blank(node, disk),
        _ => response,
    }
}

/// Whether nothing of this VM's writers is under way. For one that died that takes a while.
fn drained(node: &Node, vm: VmUid) -> bool {
    let settled = node.superblock.timings.settle + limit(node);
    node.wait_until(settled, |state| {
        state.writers.is_drained(vm) || state.writers.is_held(vm) || state.stopping
    });
    node.state().writers.is_drained(vm)
}

fn ask(node: &Node, change: &Change) -> Response {
    match node.ask(&Ask::Change(change.clone()), limit(node)) {
        Some(PeerResponse::Granted(answer)) => Response::Granted(answer),
        Some(PeerResponse::Refused(refusal)) => Response::Refused(refusal),
        _ => Response::Unknown,
    }
}

/// Makes a new disk read as zeroes, and finishes it. One thread at a time fills a disk: a second
/// one would go on writing after the first has handed the disk out.
fn blank(node: &Node, disk: &DiskRow) -> Response {
    let _filling = node.filling.lock();
    // Another thread may have finished it meanwhile: the coordinator knows.
    let current = ask(node, &create_again(disk));
    let Response::Granted(Answer::Disk(disk)) = current else {
        return current;
    };
    if !disk.importing {
        return Response::Granted(Answer::Disk(disk));
    }
    // This process is a writer meanwhile: frozen in the middle, it must be reset before somebody
    // else gets the extents.
    let vm = disk.vm.unwrap_or(VmUid::from_bytes([0; 16]));
    if let Err(reason) = add_writer(node, vm, std::process::id()) {
        return Response::Unavailable { reason };
    }
    let zeroed = zero(node, &disk);
    close(node, vm, std::process::id());
    match zeroed {
        Ok(true) => ask(
            node,
            &Change::FinishImport {
                disk: disk.disk,
                length: None,
            },
        ),
        // The lease is gone: whoever asked asks again.
        Ok(false) => Response::Unknown,
        Err(error) => Response::Unavailable {
            reason: format!("cannot zero the disk {}: {error}", disk.name),
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

/// Zeroes a disk in pieces, each of which passes the gate. False when the gate is closed.
fn zero(node: &Node, disk: &DiskRow) -> std::io::Result<bool> {
    for run in &disk.extents {
        let mut done = 0;
        while done < run.length.0 {
            let length = ZERO_BYTES.min(run.length.0 - done);
            let now = boot_time_now();
            let mine = {
                let state = node.state();
                state.is_open(now) && state.joined == disk.importer
            };
            if !mine {
                return Ok(false);
            }
            let start = Lba(run.start.0 + done / BLOCK);
            node.device.zero(start, Bytes(length))?;
            done += length;
        }
    }
    node.device.handle().flush()?;
    Ok(true)
}

/// Hands out what a process needs to reach a VM's disks; with a tenure, to write them. The writer
/// is noted before the row is looked at: a release in between finds it.
fn open(node: &Node, vm: VmUid, tenure: Option<(Owner, Epoch, u32)>) -> Answered {
    let mut fresh = false;
    if let Some((_, _, pid)) = tenure {
        match add_writer(node, vm, pid) {
            Ok(first) => fresh = first,
            Err(reason) => return (Response::Unavailable { reason }, Vec::new()),
        }
    }
    let opened = look_up(node, vm, tenure).and_then(|opened| Ok((opened, descriptors(node)?)));
    match opened {
        Ok((opened, fds)) => (Response::Opened(opened), fds),
        Err(why) => {
            if let Some((_, _, pid)) = tenure.filter(|_| fresh) {
                close(node, vm, pid);
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
    node: &Node,
    vm: VmUid,
    tenure: Option<(Owner, Epoch, u32)>,
) -> Result<OpenedVm, NotOpened> {
    let refused = |refusal| Err(NotOpened::Refused(refusal));
    let Some(PeerResponse::Rows(found)) = node.ask(&Ask::Rows, limit(node)) else {
        return Err(NotOpened::Unavailable(why_not(node)));
    };
    let Some(row) = found.vms.into_iter().find(|row| row.vm == vm) else {
        return refused(Refusal::NoSuchVm);
    };
    if let Some((owner, epoch, _)) = tenure {
        match row.owner {
            Some(now) if now == owner && row.epoch == epoch => {}
            Some(owner) => {
                let epoch = row.epoch;
                return refused(Refusal::OwnedBy { owner, epoch });
            }
            None => return refused(Refusal::EpochIs { epoch: row.epoch }),
        }
        if node.state().joined != Some(owner) {
            return refused(Refusal::StaleOwner { owner });
        }
    }
    // Half-imported disks too: this may be their importer. They say so in their row.
    let mine = |disk: &DiskRow| disk.vm == Some(vm);
    Ok(OpenedVm {
        row,
        disks: found.disks.into_iter().filter(mine).collect(),
        saved: found.saved.into_iter().find(|saved| saved.vm == vm),
        block_bytes: node.device.block_bytes(),
    })
}

fn descriptors(node: &Node) -> Result<Vec<OwnedFd>, NotOpened> {
    let unavailable = |what: String| NotOpened::Unavailable(format!("cannot pass {what}"));
    let device = node.device.descriptor();
    let device = device.map_err(|error| unavailable(format!("the device: {error}")))?;
    let gate = node.gate.reader_fd();
    let gate = gate.map_err(|error| unavailable(format!("the gate page: {error}")))?;
    Ok(vec![device, gate])
}

/// The watchdog watches before the process can write. If the heartbeat promises a reset, no writer
/// starts without it. Whether the writer is a new one.
fn add_writer(node: &Node, vm: VmUid, pid: u32) -> Result<bool, String> {
    let talk = node.watchdog_talk.lock();
    let fresh = node
        .update(|state| state.writers.open(vm, pid))
        .map_err(|error| format!("cannot note the writer: {error}"))?;
    let promised = node.state().watchdog != WatchdogKind::None;
    let enlisted = if minder::watchdog_counts(node) {
        minder::enlist(node)
    } else {
        Ok(WatchdogKind::None)
    };
    drop(talk);
    match enlisted {
        Err(error) if promised => {
            if fresh {
                close(node, vm, pid);
            }
            Err(format!("the watchdog does not watch: {error}"))
        }
        _ => Ok(fresh),
    }
}

fn close(node: &Node, vm: VmUid, pid: u32) -> Response {
    let closed = node.update(|state| state.writers.close(vm, pid));
    minder::refresh(node);
    match closed {
        Ok(()) => Response::Closed,
        Err(error) => Response::Unavailable {
            reason: format!("cannot note that the writer closed: {error}"),
        },
    }
}

fn unavailable(node: &Node) -> Response {
    let reason = why_not(node);
    Response::Unavailable { reason }
}

fn why_not(node: &Node) -> String {
    let reason = status::reason(&node.state(), boot_time_now());
    reason.unwrap_or_else(|| "no coordinator answers".to_owned())
}

/// How long a request may look for a coordinator: a silent one is replaced within W and a bit.
fn limit(node: &Node) -> Duration {
    let timings = &node.superblock.timings;
    timings.watch + timings.lease
}

const STEP: Duration = Duration::from_secs(5);
const BLOCK: u64 = bascule_volume_format::BLOCK_BYTES_U64;
/// Small enough that the lease is looked at many times a second.
const ZERO_BYTES: u64 = 4 << 20;
