//! `volume.sock`: what `bascule-node` and `bascule-vm` ask of a node's `bascule-volume`.

use std::net::SocketAddr;

use bascule_types::{
    Answer, Bytes, Change, ClusterId, DiskRow, Epoch, FenceRow, NodeUid, Owner, Refusal,
    SavedStateRow, SlotId, VmRow, VmUid, VolumeId,
};
use serde::{Deserialize, Serialize};

/// A request to `bascule-volume`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// How this volume does, as this node sees it. Never waits for another node.
    Status,
    /// All rows, from the coordinator and newer than every change acknowledged before the request.
    Rows,
    /// A metadata change. `bascule-volume` forwards it to the coordinator, and asks again until a
    /// coordinator answers or its time limit passes ([`Response::Unknown`]).
    Change(Change),
    /// What a `bascule-vm` needs to write a VM's disks. The answer carries two file descriptors:
    /// the device (read-write, `O_DIRECT` where the backing has it) and the gate page (read-only).
    /// From now on the volume has an open writer, until [`Request::CloseVm`].
    OpenVm {
        /// The VM.
        vm: VmUid,
        /// The tenure the asker was started for; refused when the row says otherwise.
        owner: Owner,
        /// Its epoch.
        epoch: Epoch,
        /// The asker's process, so that the volume can tell a dead writer from a living one.
        pid: u32,
    },
    /// What a migration's destination needs before it owns the VM: as [`Request::OpenVm`], but
    /// nothing may be written and no writer is open until `OpenVm` follows.
    PeekVm {
        /// The VM.
        vm: VmUid,
    },
    /// The VM's gate is closed and every write it submitted has completed.
    CloseVm {
        /// The VM.
        vm: VmUid,
        /// The tenure.
        owner: Owner,
        /// Its epoch.
        epoch: Epoch,
    },
    /// A write or a flush of a disk failed: the volume is failed on this node until it was opened
    /// anew and verified. Since version 2.
    ReportFailure {
        /// The VM.
        vm: VmUid,
        /// What failed, in words for a person.
        what: String,
    },
}

impl Request {
    /// The protocol version that knows this request first.
    #[must_use]
    pub const fn since(&self) -> u32 {
        match self {
            Self::ReportFailure { .. } => 2,
            _ => 1,
        }
    }
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    /// To [`Request::Status`].
    Status(VolumeStatus),
    /// To [`Request::Rows`].
    Rows(Rows),
    /// To [`Request::Change`]: granted and durable.
    Granted(Answer),
    /// The coordinator, or this process, refused; nothing was changed.
    Refused(Refusal),
    /// No coordinator answered in time. The change may have happened or may still happen: ask the
    /// same again.
    Unknown,
    /// To [`Request::OpenVm`] and [`Request::PeekVm`].
    Opened(OpenedVm),
    /// To [`Request::CloseVm`].
    Closed,
    /// To [`Request::ReportFailure`].
    Noted,
    /// The volume cannot serve, and why, in words for a person.
    Unavailable {
        /// The reason.
        reason: String,
    },
}

/// How a volume does, as one node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// The volume.
    pub volume: VolumeId,
    /// The cluster it is bound to.
    pub cluster: ClusterId,
    /// How this node reaches it.
    pub path: PathState,
    /// The reason for a state other than [`PathState::Direct`], in words for a person.
    pub reason: Option<String>,
    /// This node's slot and generation; none until it has joined.
    pub owner: Option<Owner>,
    /// How long this node's lease is still valid, in milliseconds; 0 when it has lapsed.
    pub lease_left_ms: u64,
    /// The coordinator's slot, as last seen.
    pub coordinator: Option<SlotId>,
    /// The coordinator's epoch, as last seen.
    pub coordinator_epoch: Epoch,
    /// Every registered slot, as this node sees its heartbeat.
    pub peers: Vec<PeerStatus>,
    /// Size of the data area.
    pub capacity: Bytes,
    /// Of it, allocated.
    pub allocated: Bytes,
    /// The fencing mode, as the superblock says.
    pub fencing: FencingMode,
    /// The time from a victim's silence to a proof, in milliseconds (T_safe).
    pub safe_time_ms: u64,
    /// Whether a watchdog resets this node when it cannot renew, and which.
    pub watchdog: WatchdogKind,
}

/// How a node reaches a volume. Redirected comes with redirected I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PathState {
    /// Reads and writes go to the device.
    Direct,
    /// The gate is closed: guests stall, nothing is lost.
    Paused,
    /// The device cannot be used.
    Unavailable,
}

/// The fencing mode of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FencingMode {
    /// A hardware watchdog resets a node that cannot renew its lease.
    Watchdog,
    /// Nothing resets a node: only an administrator's fencing confirmation fences it.
    LeaseOnly,
}

/// What kind of watchdog guards a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WatchdogKind {
    /// A hardware timer.
    Hardware,
    /// The kernel's software timer, explicitly allowed.
    Soft,
    /// None.
    None,
}

/// One slot, as another node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Slot and generation.
    pub owner: Owner,
    /// The node that holds it.
    pub node: NodeUid,
    /// Whether its heartbeat moved within the lease time.
    pub alive: bool,
    /// How long its heartbeat has not moved, in milliseconds, by this node's own clock.
    pub silent_ms: u64,
    /// Where its `bascule-volume` listens.
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
    /// Every disk, kept ones too.
    pub disks: Vec<DiskRow>,
    /// Saved states.
    pub saved: Vec<SavedStateRow>,
    /// Who is fenced, and why that is certain.
    #[serde(default)]
    pub fences: Vec<FenceRow>,
}

/// What a VM process needs to reach its disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenedVm {
    /// The row.
    pub row: VmRow,
    /// Its disks, kernel and initrd.
    pub disks: Vec<DiskRow>,
    /// Its saved state, if there is one.
    pub saved: Option<SavedStateRow>,
    /// The device's logical block size in bytes: the alignment of direct I/O.
    pub block_bytes: u32,
}
