//! `volume.sock`: the requests of `bascule-node` and `bascule-vm` to the node's `bascule-volume`.

use std::net::SocketAddr;

use bascule_types::{
    Answer, Bytes, Change, ClusterId, DiskRow, Epoch, FenceRow, NodeUid, Owner, Refusal,
    SavedStateRow, SlotId, VmRow, VmUid, VolumeId,
};
use serde::{Deserialize, Serialize};

/// A request to `bascule-volume`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Request {
    /// The volume's state, as this node sees it. Answered without waiting for another node.
    Status,
    /// All rows, from the coordinator and newer than every change acknowledged before the request.
    Rows,
    /// The rows of one VM, from the coordinator and newer than every change acknowledged before the request.
    /// Since version 6.
    Vm { vm: VmUid },
    /// A metadata change. `bascule-volume` forwards it to the coordinator, and repeats it until a
    /// coordinator answers or the time limit passes ([`Response::Unknown`]).
    Change(Change),
    /// What a `bascule-vm` needs to write a VM's disks. The answer carries file descriptors: the
    /// device (read-write, `O_DIRECT` where the backing has it), the gate page (read-only) and, since
    /// version 3, the process's writer page (read-write). From now on the volume has an open writer,
    /// until [`Request::CloseVm`]. `Unavailable` while a write of an earlier writer may land.
    OpenVm {
        vm: VmUid,
        /// The ownership that the requester was started for; refused when the volume's metadata
        /// has another one.
        owner: Owner,
        epoch: Epoch,
        /// The requester's process id, by which `bascule-volume` detects that the writer has died.
        pid: u32,
    },
    /// What a migration's destination needs before it owns the VM: as [`Request::OpenVm`], but
    /// nothing may be written and no writer is open until `OpenVm` follows.
    PeekVm { vm: VmUid },
    /// The VM's gate is closed and every write it submitted has completed. `Unavailable` for a writer
    /// one of whose writes failed, on this boot of the node.
    CloseVm {
        vm: VmUid,
        owner: Owner,
        epoch: Epoch,
    },
    /// A write or a flush of a disk failed, and may still land: the requester is an unclean writer for as
    /// long as the node is not restarted. Since version 2.
    ReportFailure {
        vm: VmUid,
        /// The failed operation and its error, for logs and status messages.
        what: String,
    },
}

impl Request {
    /// The protocol version in which this request was added.
    #[must_use]
    pub const fn since(&self) -> u32 {
        match self {
            Self::ReportFailure { .. } => 2,
            Self::Vm { .. } => 6,
            _ => 1,
        }
    }
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Response {
    /// To [`Request::Status`].
    Status(VolumeStatus),
    /// To [`Request::Rows`].
    Rows(Rows),
    /// To [`Request::Vm`]; none of a VM that the volume does not have.
    Vm(Option<VmRows>),
    /// To [`Request::Change`]: granted and durable.
    Granted(Answer),
    /// The coordinator, or this process, refused; nothing was changed.
    Refused(Refusal),
    /// No coordinator answered in time. The change may have happened or may still happen: repeat
    /// the same request.
    Unknown,
    /// To [`Request::OpenVm`] and [`Request::PeekVm`].
    Opened(OpenedVm),
    /// To [`Request::CloseVm`].
    Closed,
    /// To [`Request::ReportFailure`].
    Noted,
    /// The volume cannot serve the request; the reason is for status messages.
    Unavailable { reason: String },
}

/// A volume's state, as one node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct VolumeStatus {
    pub volume: VolumeId,
    /// The cluster that the volume is bound to.
    pub cluster: ClusterId,
    /// How this node reaches the volume.
    pub path: PathState,
    /// The reason for a state other than [`PathState::Direct`], for status messages.
    pub reason: Option<String>,
    /// This node's slot and generation; none until it has joined.
    pub owner: Option<Owner>,
    /// The remaining validity of this node's lease in milliseconds; 0 when it has lapsed.
    pub lease_left_ms: u64,
    /// The coordinator's slot, as last seen.
    pub coordinator: Option<SlotId>,
    /// The coordinator's epoch, as last seen.
    pub coordinator_epoch: Epoch,
    /// Every registered slot, as this node sees its heartbeat.
    pub peers: Vec<PeerStatus>,
    /// The size of the data area.
    pub capacity: Bytes,
    /// The allocated part of the data area.
    pub allocated: Bytes,
    /// The fencing mode in the superblock.
    pub fencing: FencingMode,
    /// The safe time in milliseconds: from a node's last observed heartbeat to its fence proof.
    pub safe_time_ms: u64,
    /// The watchdog that resets this node when it cannot renew its lease.
    pub watchdog: WatchdogKind,
}

/// How a node reaches a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PathState {
    /// Reads and writes go to the device.
    Direct,
    /// The gate is closed: guest writes stall and no data is lost.
    Paused,
    /// The device cannot be used.
    Unavailable,
}

/// The fencing mode of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FencingMode {
    /// A hardware watchdog resets a node that cannot renew its lease.
    Watchdog,
    /// Nothing resets a node: only a manual fencing confirmation fences it.
    LeaseOnly,
}

/// What kind of watchdog guards a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WatchdogKind {
    /// A hardware timer, which works even when the kernel hangs.
    Hardware,
    /// The kernel's software timer (softdog), which the volume's policy allows.
    Soft,
    /// No watchdog.
    None,
}

/// One slot, as another node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Slot and generation.
    pub owner: Owner,
    /// The node that holds the slot.
    pub node: NodeUid,
    /// Whether the node may still hold its lease, as far as the reporting node's reads show. Enough to
    /// suspect a node by, not to take anything from it.
    pub alive: bool,
    /// The time since this node saw the heartbeat change, in milliseconds of its own clock.
    pub no_heartbeat_ms: u64,
    /// The address at which the node's `bascule-volume` listens for peers.
    pub address: Option<SocketAddr>,
    /// Whether this (slot, generation) has a fence record.
    pub fenced: bool,
}

/// All rows of a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rows {
    /// The epoch of the coordinator that answered.
    pub coordinator_epoch: Epoch,
    /// Every VM.
    pub vms: Vec<VmRow>,
    /// Every disk, kept disks included.
    pub disks: Vec<DiskRow>,
    /// Saved states.
    pub saved: Vec<SavedStateRow>,
    /// The fenced owners with their fence proofs.
    #[serde(default)]
    pub fences: Vec<FenceRow>,
}

/// The rows of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct VmRows {
    pub row: VmRow,
    /// The VM's disks, kernel and initrd, also those that are being imported.
    pub disks: Vec<DiskRow>,
    /// The VM's saved state, if there is one.
    pub saved: Option<SavedStateRow>,
}

/// What a VM process needs to reach its disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct OpenedVm {
    pub row: VmRow,
    /// The VM's disks, kernel and initrd.
    pub disks: Vec<DiskRow>,
    /// The VM's saved state, if there is one.
    pub saved: Option<SavedStateRow>,
    /// The device's logical block size in bytes: the alignment of direct I/O.
    pub block_bytes: u32,
    /// The volume's settle time in milliseconds: for how long a write that failed may still land. None
    /// from an earlier release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settle_ms: Option<u64>,
}
