//! The commands that the operator sends to a node, and their outcomes.

use std::net::SocketAddr;
use std::path::PathBuf;

use bascule_ipc::vm::{CloudInit, MigrationLimits};
use bascule_ipc::volume::{FencingMode, Rows};
use bascule_types::{
    Answer, AttemptId, Bytes, Change, ClusterId, DiskId, Epoch, ImageDigest, OnError, OnPanic,
    Owner, Refusal, SourceAuthorization, VmUid, VolumeId,
};
use serde::{Deserialize, Serialize};

use crate::cloud_init::CloudInitSecrets;

/// One command. All are idempotent: the operator repeats a command whose outcome it does not know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Command {
    /// Format a blank device as a SharedVolume that is bound to the cluster. This node gets the first
    /// slot. Rejected when the device holds data.
    FormatVolume {
        /// The device or file.
        backing: Backing,
        /// The cluster that the volume is bound to.
        cluster: ClusterId,
        /// Timing, fencing, extent size.
        options: FormatOptions,
    },
    /// Attach a volume: start its `bascule-volume`, which claims this node's slot.
    AttachVolume {
        /// The SharedVolume's name.
        name: String,
        /// The device or file on this node.
        backing: Backing,
        /// The identity that the superblock must have; none before the operator knows it.
        volume: Option<VolumeId>,
        /// The cluster that the volume must be bound to.
        cluster: ClusterId,
    },
    /// Detach a volume on which no VM of this node has an open writer.
    DetachVolume {
        /// The SharedVolume's name.
        name: String,
    },
    /// Request a metadata change through this node's `bascule-volume`.
    Change {
        /// The SharedVolume's name.
        volume: String,
        change: Change,
    },
    /// All rows of a volume.
    Rows {
        /// The SharedVolume's name.
        volume: String,
    },
    /// Fill a disk that is being imported, as the VM's owner. [`crate::report::ImportReport`] has
    /// the progress.
    Import {
        /// The SharedVolume's name.
        volume: String,
        /// The VM that the disk belongs to; this node owns it.
        vm: VmUid,
        /// This node's slot and generation.
        owner: Owner,
        /// The epoch of that ownership.
        epoch: Epoch,
        disk: DiskId,
        /// The number of the attempt, from 1. One that runs or has ended is not repeated.
        #[serde(default)]
        attempt: u32,
        /// Where the disk's contents come from.
        source: ImportSource,
    },
    /// End the import of a disk, if it runs, and forget its report.
    CancelImport { disk: DiskId },
    /// Start a VM that this node owns.
    StartVm {
        spec: VmSpec,
        /// This node's slot and generation.
        owner: Owner,
        /// The epoch of that ownership.
        epoch: Epoch,
        /// Restore the guest from the volume's saved state, instead of booting it.
        restore: bool,
    },
    /// Build a VM completely and wait for its live migration. Answered with
    /// [`Outcome::Listening`].
    PrepareIncoming {
        spec: VmSpec,
        /// The attempt to accept; a stream of any other attempt is refused.
        attempt: AttemptId,
        /// This node's slot and generation, the owner after the migration.
        owner: Owner,
        /// The epoch in which the source owns the VM.
        epoch: Epoch,
    },
    /// Migrate a VM of this node live.
    MigrateLive {
        vm: VmUid,
        attempt: AttemptId,
        /// Where the destination listens.
        peer: SocketAddr,
        /// The destination's slot and generation, the owner after the migration.
        to: Owner,
        /// Downtime, total time and bandwidth.
        limits: MigrationLimits,
    },
    /// Save a VM of this node to its volume and transfer (or release) its ownership.
    MigrateQuick {
        vm: VmUid,
        attempt: AttemptId,
        /// The next owner; none to release the ownership.
        to: Option<Owner>,
    },
    /// Cancel a migration whose commit request has not been sent.
    CancelMigration { vm: VmUid, attempt: AttemptId },
    /// Have the guest shut itself down, by its agent or its ACPI power button.
    PowerButton { vm: VmUid },
    /// Stop the guest now and release its ownership.
    StopVm { vm: VmUid },
    /// Errors of this disk go to the guest from now on; one that was paused for them is resumed.
    ReportDiskErrors {
        vm: VmUid,
        /// The disk's name in the VM's spec.
        disk: String,
    },
    /// Remove a VM process that is stopped or departed, or that waits for an attempt that was given
    /// up, together with its run directory and tap devices.
    CollectVm {
        vm: VmUid,
        /// The reported process id, so that a newer process of the same VM is not removed.
        pid: u32,
    },
    /// The spec that a VM of this node was started with. Answered with [`Outcome::Spec`].
    ReadSpec { vm: VmUid },
    /// The last serial output of a VM that runs here, or has run here. Answered with [`Outcome::ConsoleLog`].
    ReadConsoleLog { vm: VmUid },
    /// End the hold process of a reservation pod whose VM has left this node.
    EndReservation {
        /// The pod's UID.
        pod_uid: String,
    },
}

/// The outcome of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Outcome {
    /// Done; or begun, and the node's reports have the progress.
    Done,
    /// The volume granted the change.
    Granted(Answer),
    /// The volume refused the change; nothing was altered.
    Refused(Refusal),
    /// No coordinator answered, so the change may have happened: repeat the same request.
    Unknown,
    /// To [`Command::Rows`].
    Rows(Rows),
    /// To [`Command::ReadSpec`].
    Spec(Box<VmSpec>),
    /// To [`Command::ReadConsoleLog`].
    ConsoleLog {
        /// At most 256 KiB, base64.
        output: String,
        /// The time since the guest has written the last of it, in milliseconds.
        age_ms: u64,
    },
    /// The new volume's identity.
    Formatted { volume: VolumeId },
    /// Where the incoming VM listens.
    Listening { address: SocketAddr },
    /// The node cannot execute the command. Nothing was changed.
    Rejected {
        /// For the operator's decisions.
        reason: RejectReason,
        /// For users; names the field or device and says what to do.
        message: String,
    },
}

/// Why a node cannot execute a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RejectReason {
    /// `/dev/kvm` is missing or cannot be used.
    KvmUnavailable,
    /// No such bridge, or not in the allow-list.
    BridgeUnavailable,
    /// No such backing device, or it cannot be opened.
    DeviceUnavailable,
    /// The device holds another volume than the expected one, or none.
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
    /// The VM's state does not allow the command.
    WrongState,
    /// The source is not on the administrator's allow-list.
    SourceNotAllowed,
    /// The process that would execute the command does not respond.
    ProcessUnresponsive,
    /// Any other failure; the message says which.
    Failed,
}

/// The device or file that a volume is stored on, as one node reaches it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Backing {
    /// A block device, by a stable path.
    Device {
        /// The path, `/dev/disk/by-id/…`.
        path: PathBuf,
    },
    /// A file, for one host or a lab. VMs on it are never reported as protected.
    File {
        path: PathBuf,
        /// The size with which a format creates the file.
        size: Option<Bytes>,
    },
}

/// How a volume is formatted. Times are in milliseconds; `None` takes the format's default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct FormatOptions {
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
    /// Accept the kernel's software watchdog (softdog) for [`FencingMode::Watchdog`].
    #[serde(default)]
    pub allow_software_watchdog: bool,
    /// Accept the Node's out-of-service taint as a manual fencing confirmation.
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
#[expect(missing_docs, reason = "the field names say all")]
pub enum ImportSource {
    /// Nothing: the disk reads as zeroes.
    Blank,
    /// A file by http or https.
    Http {
        url: String,
        /// The hash that the file must have.
        digest: ImageDigest,
        /// Certificate authorities to trust beside the node's, in PEM.
        #[serde(default)]
        ca_bundle: Option<String>,
        /// The header Authorization, which only the URL's own origin gets.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        authorization: Option<SourceAuthorization>,
    },
    /// A file of the node, by its name in the administrator's allow-list.
    HostFile {
        /// The name in the list.
        name: String,
    },
}

/// A VM's spec as the operator sends it: disks are resolved to names on the volume, networks are
/// still the administrator's names, which only the node can resolve to bridges.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct VmSpec {
    pub uid: VmUid,
    pub namespace: String,
    pub name: String,
    /// The name of the home volume.
    pub volume: String,
    /// The number of virtual CPUs.
    pub cpus: u8,
    /// Guest RAM.
    pub memory: Bytes,
    /// The kernel's name on the volume, `<namespace>/<disk>`; none to boot by firmware.
    #[serde(default)]
    pub kernel: Option<String>,
    /// The initial RAM disk's name on the volume.
    pub initrd: Option<String>,
    /// The kernel command line.
    pub cmdline: String,
    /// The disks, in the order of their PCI slots.
    pub disks: Vec<DiskRef>,
    /// The interfaces, in the order of their PCI slots.
    pub interfaces: Vec<Interface>,
    /// How long the guest has to switch itself off when its node shuts down, in milliseconds; none for the
    /// default. No reason to restart the guest when it changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shutdown_timeout_ms: Option<u64>,
    /// What cloud-init finds in the guest; none for a guest without the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cloud_init: Option<CloudInit>,
    /// The keys of Secrets that texts of `cloud_init` were read from. A node keeps them for the operator,
    /// which reads no Secret anew to restore a guest.
    #[serde(default, skip_serializing_if = "CloudInitSecrets::is_empty")]
    pub cloud_init_secrets: CloudInitSecrets,
    /// Whether the guest has a port for its agent.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub guest_agent: bool,
    /// What a panic of the guest's kernel does.
    #[serde(default, skip_serializing_if = "OnPanic::is_default")]
    pub on_panic: OnPanic,
}

impl VmSpec {
    /// Takes the texts of Secrets from `earlier`, a spec that the same VM was started with. False, and nothing is
    /// taken, when that one referred to other keys.
    pub fn take_secret_texts(&mut self, earlier: Self) -> bool {
        let (Some(texts), Some(found)) = (&mut self.cloud_init, earlier.cloud_init) else {
            return false;
        };
        if self.cloud_init_secrets != earlier.cloud_init_secrets {
            return false;
        }
        if self.cloud_init_secrets.user_data.is_some() {
            texts.user_data = found.user_data;
        }
        if self.cloud_init_secrets.network_config.is_some() {
            texts.network_config = found.network_config;
        }
        true
    }
}

/// A disk in a VM's spec.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRef {
    /// The name in the spec.
    pub name: String,
    /// The name on the volume, `<namespace>/<disk>`.
    pub row: String,
    /// What a failed read or write does.
    #[serde(default, skip_serializing_if = "OnError::is_default")]
    pub on_error: OnError,
    /// Whether the guest may only read it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
}

/// A network interface in a VM's spec.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Interface {
    /// The administrator's name of a network, which the node resolves to a bridge.
    pub network: String,
    pub mac: [u8; 6],
}
