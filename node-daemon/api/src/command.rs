//! What the operator asks of a node.

use std::net::SocketAddr;
use std::path::PathBuf;

use bascule_ipc::vm::MigrationLimits;
use bascule_ipc::volume::{FencingMode, Rows};
use bascule_types::{
    Answer, AttemptId, Bytes, Change, ClusterId, DiskId, Epoch, Owner, Refusal, VmUid, VolumeId,
};
use serde::{Deserialize, Serialize};

/// One command. All are idempotent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Format a blank device as a SharedVolume, bound to the cluster, this node as its first.
    /// Rejected when the device holds anything.
    FormatVolume {
        /// The device or file.
        backing: Backing,
        /// The cluster it is bound to.
        cluster: ClusterId,
        /// Timing, fencing, extent size.
        options: FormatOptions,
    },
    /// Attach a volume: start its `bascule-volume`, join it.
    AttachVolume {
        /// The SharedVolume's name.
        name: String,
        /// The device or file on this node.
        backing: Backing,
        /// The volume that must be there, once it is known.
        volume: Option<VolumeId>,
        /// The cluster that it must be bound to.
        cluster: ClusterId,
    },
    /// Detach a volume on which no VM of this node has an open writer.
    DetachVolume {
        /// The SharedVolume's name.
        name: String,
    },
    /// Ask for a metadata change through this node's `bascule-volume`.
    Change {
        /// The SharedVolume's name.
        volume: String,
        /// The change.
        change: Change,
    },
    /// All rows of a volume.
    Rows {
        /// The SharedVolume's name.
        volume: String,
    },
    /// Fill a disk that is being imported, as the row's owner; the report tells how it goes.
    Import {
        /// The SharedVolume's name.
        volume: String,
        /// The VM, whose row this node owns.
        vm: VmUid,
        /// This node's slot and generation.
        owner: Owner,
        /// The row's epoch.
        epoch: Epoch,
        /// The disk.
        disk: DiskId,
        /// Where its contents come from.
        source: ImportSource,
    },
    /// Start a VM that this node owns.
    StartVm {
        /// The VM.
        spec: VmSpec,
        /// This node's slot and generation.
        owner: Owner,
        /// The row's epoch.
        epoch: Epoch,
        /// Restore the guest from the volume's saved state, instead of booting it.
        restore: bool,
    },
    /// Build a VM completely and wait for its live migration. Answered with
    /// [`Outcome::Listening`].
    PrepareIncoming {
        /// The VM.
        spec: VmSpec,
        /// The attempt that may come in.
        attempt: AttemptId,
        /// This node's slot and generation: who will own the row.
        owner: Owner,
        /// The epoch of the source.
        epoch: Epoch,
    },
    /// Move a VM of this node live.
    MigrateLive {
        /// The VM.
        vm: VmUid,
        /// The attempt.
        attempt: AttemptId,
        /// Where the destination listens.
        peer: SocketAddr,
        /// Who will own the row.
        to: Owner,
        /// Limits.
        limits: MigrationLimits,
    },
    /// Save a VM of this node to its volume and transfer (or release) its row.
    MigrateQuick {
        /// The VM.
        vm: VmUid,
        /// The attempt.
        attempt: AttemptId,
        /// Who will own the row; none to release it.
        to: Option<Owner>,
    },
    /// Give a migration up, if its commit request has not been sent.
    CancelMigration {
        /// The VM.
        vm: VmUid,
        /// The attempt.
        attempt: AttemptId,
    },
    /// Press the guest's power button.
    PowerButton {
        /// The VM.
        vm: VmUid,
    },
    /// Stop the guest now and release its row.
    StopVm {
        /// The VM.
        vm: VmUid,
    },
    /// Forget a VM process that is stopped or departed, or that waits for an attempt that will not
    /// come.
    CollectVm {
        /// The VM.
        vm: VmUid,
        /// The process, as reported, so that a newer one is not collected in its place.
        pid: u32,
    },
    /// End the hold process of a reservation pod, whose VM has left this node.
    EndReservation {
        /// The pod's UID.
        pod_uid: String,
    },
}

/// What became of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Done, or begun where the report tells the rest.
    Done,
    /// The volume granted the change.
    Granted(Answer),
    /// The volume refused the change; nothing was altered.
    Refused(Refusal),
    /// Nobody knows yet whether the change happened: ask the same again.
    Unknown,
    /// The rows asked for.
    Rows(Rows),
    /// The new volume's identity.
    Formatted {
        /// The volume.
        volume: VolumeId,
    },
    /// Where the incoming VM listens.
    Listening {
        /// The address.
        address: SocketAddr,
    },
    /// The node cannot do it, and why, in words for a person. Nothing was changed.
    Rejected {
        /// For programs.
        reason: RejectReason,
        /// For people; names the field or device.
        message: String,
    },
}

/// Why a node cannot do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RejectReason {
    /// `/dev/kvm` is missing or cannot be used.
    KvmUnavailable,
    /// No such bridge, or not in the allow-list.
    BridgeUnavailable,
    /// No such backing device, or it cannot be opened.
    DeviceUnavailable,
    /// The device holds something else than the expected volume.
    WrongVolume,
    /// The device holds data and is not formatted.
    NotBlank,
    /// The device is too small.
    TooSmall,
    /// The format is newer than this release.
    NewerFormat,
    /// The volume is not attached on this node.
    VolumeNotAttached,
    /// The VM does not run on this node.
    VmNotHere,
    /// The VM is not in a state for this.
    WrongState,
    /// The source is not on the administrator's allow-list.
    SourceNotAllowed,
    /// The process that should do it does not answer.
    ProcessUnresponsive,
    /// Anything else.
    Failed,
}

/// What backs a volume on a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// A block device, by a stable path.
    Device {
        /// The path, `/dev/disk/by-id/…`.
        path: PathBuf,
    },
    /// A file on one host, or a lab's: never called protected.
    File {
        /// The path.
        path: PathBuf,
        /// Its size when it is created by a format.
        size: Option<Bytes>,
    },
}

/// How a volume is formatted. Times in milliseconds; none takes the format's default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormatOptions {
    /// The fencing mode.
    pub fencing: FencingMode,
    /// Lease length L.
    pub lease_ms: Option<u64>,
    /// Watch time W.
    pub watch_ms: Option<u64>,
    /// Watchdog timeout.
    pub watchdog_ms: Option<u64>,
    /// Settle time.
    pub settle_ms: Option<u64>,
    /// Extent size.
    pub extent: Option<Bytes>,
    /// Let the kernel's software watchdog count as one.
    #[serde(default)]
    pub allow_software_watchdog: bool,
    /// Let the out-of-service taint count as an administrator's fencing confirmation.
    #[serde(default)]
    pub allow_out_of_service_taint: bool,
}

impl FormatOptions {
    /// The format's defaults, with this fencing mode.
    #[must_use]
    pub const fn new(fencing: FencingMode) -> Self {
        Self {
            fencing,
            lease_ms: None,
            watch_ms: None,
            watchdog_ms: None,
            settle_ms: None,
            extent: None,
            allow_software_watchdog: false,
            allow_out_of_service_taint: false,
        }
    }
}

/// Where a disk's contents come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImportSource {
    /// Nothing: the disk reads as zeroes.
    Blank,
    /// A file by http or https.
    Http {
        /// The URL.
        url: String,
        /// SHA-256 of the file, 64 hex digits.
        sha256: String,
    },
    /// A file of the node, by its name in the administrator's allow-list.
    HostFile {
        /// The name in the list.
        name: String,
    },
}

/// A VM as a node needs it: intent, resolved by the operator as far as it can be off the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// The VM.
    pub uid: VmUid,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The SharedVolume that is its home.
    pub volume: String,
    /// Virtual CPUs.
    pub cpus: u8,
    /// Guest RAM.
    pub memory: Bytes,
    /// The kernel's disk row, `<namespace>/<disk>`.
    pub kernel: String,
    /// The initial RAM disk's.
    pub initrd: Option<String>,
    /// The kernel command line.
    pub cmdline: String,
    /// The disks, in order: the name in the spec, and the row's name.
    pub disks: Vec<DiskRef>,
    /// The interfaces, in order.
    pub interfaces: Vec<Interface>,
}

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRef {
    /// The name in the spec.
    pub name: String,
    /// The row's name.
    pub row: String,
}

/// A network interface of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// The administrator's name of a network, which the node resolves to a bridge.
    pub network: String,
    /// The MAC address.
    pub mac: [u8; 6],
}
