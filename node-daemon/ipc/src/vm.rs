//! `vm.sock`: the requests of `bascule-node` to a `bascule-vm`, and the configuration that it starts the
//! process with.

mod guest;
mod panics;
mod resets;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use bascule_types::{AttemptId, Bytes, Epoch, OnError, OnPanic, Owner, PortRange, VmUid};
use serde::{Deserialize, Serialize};

pub use guest::{GuestAgent, GuestInfo, GuestInterface, GuestOs};
pub use panics::{Panic, PanicStatus};
pub use resets::{ResetCause, ResetStatus};

/// The configuration of a `bascule-vm`, which `bascule-node` writes to `config.json`. Names are
/// resolved to paths and numbers, and this node already owns the VM, unless the VM is incoming.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct VmConfig {
    /// The format version of this document, [`VmConfig::VERSION`].
    pub version: u32,
    pub uid: VmUid,
    /// `<namespace>/<name>`.
    pub name: String,
    /// The number of virtual CPUs.
    pub cpus: u8,
    /// Guest RAM.
    pub memory: Bytes,
    /// The kernel, initrd and command line.
    pub boot: Boot,
    /// The disks, in the order of their PCI slots.
    pub disks: Vec<DiskConfig>,
    /// The network interfaces, in the order of their PCI slots.
    pub interfaces: Vec<InterfaceConfig>,
    /// The home volume; none only for a VM whose disks are files (tests).
    pub home: Option<Home>,
    /// Boot, restore or wait for a migration.
    pub start: StartMode,
    /// The folder of the node's TLS identity ([`crate::tls`]), for migration streams.
    pub tls_dir: Option<PathBuf>,
    /// How long the guest has to switch itself off after SIGTERM to the process, in milliseconds; none for
    /// [`VmConfig::SHUTDOWN_TIMEOUT`].
    #[serde(default)]
    pub shutdown_timeout_ms: Option<u64>,
    /// What cloud-init finds in the guest; none for a guest without the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cloud_init: Option<CloudInit>,
    /// The user that the process becomes before it looks at anything of its guest's; none for the one that it
    /// is started as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<ProcessUser>,
    /// Whether the guest has a port for its agent.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub guest_agent: bool,
    /// What a panic of the guest's kernel does.
    #[serde(default, skip_serializing_if = "OnPanic::is_default")]
    pub on_panic: OnPanic,
}

/// The user of a process, which no other process of the node has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessUser {
    /// User id, and id of the main group.
    pub id: u32,
    /// The groups of what all VM processes of the node may use: the sockets of the volumes, and the node's TLS
    /// identity.
    pub groups: Vec<u32>,
}

/// The contents of a guest's cloud-init disk (data source NoCloud), as its user wrote them. Instance
/// identity and host name come from the VM's UID and name.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloudInit {
    /// The file `user-data`; empty for none.
    pub user_data: String,
    /// The file `network-config`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_config: Option<String>,
    /// The public keys of `meta-data`, one line of `authorized_keys` each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ssh_authorized_keys: Vec<String>,
}

/// Lengths only: the texts may hold passwords, and documents are logged.
impl fmt::Debug for CloudInit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CloudInit")
            .field("user_data_bytes", &self.user_data.len())
            .field(
                "network_config_bytes",
                &self.network_config.as_ref().map(String::len),
            )
            .field("ssh_authorized_keys", &self.ssh_authorized_keys.len())
            .finish()
    }
}

/// Past serial output that is kept of each VM, in bytes.
pub const CONSOLE_HISTORY_BYTES: usize = 256 << 10;

impl VmConfig {
    /// The version that this release writes.
    pub const VERSION: u32 = 1;
    /// As `shutdownTimeout` of a VirtualMachine by default.
    pub const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(120);

    /// How long the guest has to switch itself off after SIGTERM to the process.
    #[must_use]
    pub fn shutdown_timeout(&self) -> Duration {
        self.shutdown_timeout_ms
            .map_or(Self::SHUTDOWN_TIMEOUT, Duration::from_millis)
    }
}

/// A VM's home volume, and the ownership in which the process writes to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Home {
    /// The socket of the node's `bascule-volume` process for the volume.
    pub socket: PathBuf,
    /// This node's slot and generation; for an incoming VM, the owner after the migration.
    pub owner: Owner,
    /// The epoch of the ownership; for an incoming VM, the source's epoch.
    pub epoch: Epoch,
}

/// The boot images and the command line of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// The kernel: a bzImage, or an ELF file with a PVH note.
    pub kernel: ImageSource,
    /// The initial RAM disk.
    pub initrd: Option<ImageSource>,
    /// The kernel command line.
    pub cmdline: String,
}

/// The location of a boot image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum ImageSource {
    /// A disk of the VM on its home volume, whose size is the image's length.
    Volume {
        /// The disk's name on the volume, `<namespace>/<disk>`.
        disk: String,
    },
    /// A file (a VM without a home).
    File { path: PathBuf },
    /// As the kernel: UEFI firmware, which boots the first disk that can. The file is an ELF file with a PVH note, as a
    /// kernel; without initrd and command line.
    Firmware { path: PathBuf },
}

/// One virtio-blk disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// The name in the VM's spec; the guest sees a serial number made from it.
    pub name: String,
    /// Where the disk's blocks are.
    pub source: DiskSource,
    /// What a failed read or write does.
    #[serde(default)]
    pub on_error: OnError,
}

/// The location of a disk's blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum DiskSource {
    /// A disk of the home volume.
    Volume {
        /// The disk's name on the volume, `<namespace>/<disk>`.
        disk: String,
        /// Whether the device offers `VIRTIO_BLK_F_RO`.
        #[serde(default)]
        read_only: bool,
    },
    /// A file (a VM without a home).
    File {
        path: PathBuf,
        /// Whether the device offers `VIRTIO_BLK_F_RO`.
        read_only: bool,
    },
}

/// One virtio-net interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct InterfaceConfig {
    /// The name of the tap device, which `bascule-node` has created and attached to its bridge.
    pub tap: String,
    pub mac: [u8; 6],
    /// The MTU of its bridge in bytes, which the device announces to the guest; none when it is not known.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// The name of its bridge on this node, for messages; empty when it is not known.
    #[serde(default)]
    pub bridge: String,
}

/// How the guest of a `bascule-vm` starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StartMode {
    /// Boot the guest.
    Boot,
    /// Wait for a live migration.
    Incoming {
        /// The address to listen on; port 0 takes a free port ([`VmStatus::listening`]).
        listen: SocketAddr,
        /// The ports of which the first free one is taken instead of the port in `listen`; none for the
        /// port in `listen`.
        #[serde(default)]
        ports: Option<PortRange>,
        /// The attempt to accept; a stream of any other attempt is refused.
        attempt: AttemptId,
    },
    /// Restore the guest from the saved state on the home volume, and delete the saved state when
    /// the guest runs.
    Restore,
}

/// A request to a `bascule-vm`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Request {
    /// The VM's state.
    Status,
    /// The operation that the VM waits for at this moment. Since version 2.
    WaitsFor,
    /// Have the guest shut itself down: by its agent if that answers, and by the ACPI power button if it has none, does
    /// not obey, or was told to before.
    PowerButton,
    /// Stop the guest now, drain its devices and release the ownership. Answered when that is done,
    /// or, when a device or the volume takes long, when it has begun: [`Request::WaitsFor`] then
    /// names the pending operation.
    Stop,
    /// Reset the machine in place, as its guest does with a reboot. Answered at once. Since version 4.
    Reset,
    /// Pause the guest. Answered at the same times as [`Request::Stop`].
    Pause,
    /// Resume a paused guest.
    Resume,
    /// Errors of this disk go to the guest from now on. A guest that was paused for one is resumed: the
    /// failed request is tried again first. Only to a process whose status has a disk error.
    ReportDiskErrors {
        /// The disk's name in the VM's spec.
        disk: String,
    },
    /// Migrate live to another node. Answered at once; [`VmStatus::migration`] has the progress.
    MigrateLive {
        attempt: AttemptId,
        /// The address at which the destination's `bascule-vm` listens.
        peer: SocketAddr,
        /// The destination's slot and generation, the owner after the migration.
        to: Owner,
        /// Downtime, total time and bandwidth.
        limits: MigrationLimits,
    },
    /// Save RAM and device state to the volume and transfer the ownership (or release it, without
    /// `to`). Answered at once.
    MigrateQuick {
        attempt: AttemptId,
        /// The next owner; none to release the ownership.
        to: Option<Owner>,
    },
    /// Cancel a migration whose commit request has not been sent.
    CancelMigration { attempt: AttemptId },
    /// Announce the guest's interfaces again (RARP and gratuitous ARP).
    Announce,
    /// Attach to the guest's serial console: the answer carries one end of a socket pair, which is
    /// a stream of raw bytes in both directions. A new console detaches the one before.
    Console,
    /// As [`Request::Console`], beside up to 7 others of this kind, answered with [`Response::Console`]. The process closes
    /// the stream of one that does not keep up, and all when the guest is off or runs on another node. Since version 5.
    ConsoleFrom {
        /// The position from which on output is wanted: that many bytes the guest has written to the serial port since
        /// its start. None for the last 64 KiB, and what follows.
        from: Option<u64>,
    },
    /// End the process; refused unless the VM is stopped or departed, or never ran.
    Exit,
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Response {
    /// To [`Request::Status`].
    Status(Box<VmStatus>),
    /// To [`Request::WaitsFor`], for error messages; none when the VM waits for nothing.
    WaitsFor(Option<String>),
    /// The request is begun, or done.
    Accepted,
    /// To [`Request::ConsoleFrom`], with one end of a socket pair.
    Console {
        /// The position of the stream's first byte. A later one than the one asked for where the bytes between are not
        /// kept any more.
        position: u64,
    },
    /// Not possible now; the reason is for error messages. Nothing was changed.
    Refused { reason: String },
}

/// The status of a VM process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct VmStatus {
    pub uid: VmUid,
    /// The release of this process.
    pub release: String,
    pub pid: u32,
    /// The state of the process and its guest.
    pub state: VmState,
    /// The owner as which the process runs; none for a VM without a home volume.
    pub owner: Option<Owner>,
    /// The epoch of that ownership.
    pub epoch: Epoch,
    /// The address at which an incoming VM listens.
    pub listening: Option<SocketAddr>,
    /// The current or last migration.
    pub migration: Option<MigrationStatus>,
    /// Whether writes stall because the I/O gate is closed.
    pub io_stalled: bool,
    /// The guest's IP addresses, as far as known.
    pub addresses: Vec<IpAddr>,
    /// The error for which the guest is paused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_error: Option<DiskError>,
    /// The resets of its machine.
    #[serde(default)]
    pub resets: ResetStatus,
    /// Its agent; none for a guest that has no port for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_agent: Option<GuestAgent>,
    /// The panics of its kernel.
    #[serde(default, skip_serializing_if = "PanicStatus::is_none")]
    pub panics: PanicStatus,
}

impl VmStatus {
    /// Of a process of which no more than this is known, not even its owner and epoch.
    #[must_use]
    pub fn bare(uid: VmUid, pid: u32, state: VmState) -> Self {
        Self {
            uid,
            release: String::new(),
            pid,
            state,
            owner: None,
            epoch: Epoch::default(),
            listening: None,
            migration: None,
            io_stalled: false,
            addresses: Vec::new(),
            disk_error: None,
            resets: ResetStatus::default(),
            guest_agent: None,
            panics: PanicStatus::default(),
        }
    }
}

/// An error of a disk whose policy is [`OnError::Pause`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskError {
    /// The disk's name in the VM's spec.
    pub disk: String,
    /// What failed and how, for status messages.
    pub what: String,
}

/// The last state, which a process writes to `state.json` of its run directory before it ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct LastState {
    pub uid: VmUid,
    /// The state at that time.
    pub state: VmState,
}

/// The state of a VM process and its guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// The machine is being built or restored.
    Starting,
    /// The process waits for a migration, or receives it.
    Incoming,
    /// The guest runs; its disk writes may stall ([`VmStatus::io_stalled`]).
    Running,
    /// The guest is paused on request or for a migration's last step.
    Paused,
    /// The commit request was sent and its outcome is not known yet: nothing runs here.
    InDoubt,
    /// The guest runs on another node. This process never runs it again.
    Departed,
    /// The guest is off.
    Stopped(StopReason),
}

/// Why a guest is off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopReason {
    /// The guest powered itself off.
    GuestShutdown,
    /// The guest requested a reset, and its process is of a release that does not reset machines in place:
    /// the VM is started again.
    GuestReset,
    /// [`Request::Stop`] was executed.
    Requested,
    /// The guest caused a fault that ends a machine, such as a triple fault.
    GuestFault {
        /// The cause, for status messages.
        what: String,
    },
    /// The VM process failed.
    Failed {
        /// The cause, for status messages.
        what: String,
    },
}

/// The limits of a live migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationLimits {
    /// The vCPUs are stopped only when the predicted downtime is at most this, in milliseconds.
    pub downtime_ms_max: u64,
    /// The time after which a migration that has not converged is given up, in milliseconds.
    pub total_ms_max: u64,
    /// The bandwidth limit in bytes per second; `None` for no limit.
    pub bytes_per_second_max: Option<u64>,
}

impl Default for MigrationLimits {
    fn default() -> Self {
        Self {
            downtime_ms_max: 300,
            total_ms_max: 120_000,
            bytes_per_second_max: None,
        }
    }
}

/// The progress of the current migration, or the result of the last one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct MigrationStatus {
    pub attempt: AttemptId,
    /// The current or last phase.
    pub phase: MigrationPhase,
    /// Pre-copy rounds begun.
    pub rounds: u32,
    /// The bytes sent (source) or received (destination).
    pub bytes: Bytes,
    /// The bytes of guest memory still to send.
    pub remaining: Bytes,
    /// The predicted downtime in milliseconds.
    pub downtime_ms_predicted: Option<u64>,
    /// The measured downtime in milliseconds, from stopping the source's vCPUs until the source
    /// received the destination's message that its vCPUs run.
    pub downtime_ms: Option<u64>,
    /// The time from the request to the end, in milliseconds.
    pub total_ms: u64,
    /// The duration of each phase in milliseconds, in order.
    pub timings: Vec<(MigrationPhase, u64)>,
    /// The cause of the failure.
    pub failure: Option<String>,
}

/// The phases of a migration, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MigrationPhase {
    /// Connecting and comparing configurations; the destination is built.
    Preparing,
    /// Memory is copied while the guest runs.
    PreCopy,
    /// The source is stopped; the last pages and the state are sent.
    Stopping,
    /// The ownership transfer has been requested.
    Committing,
    /// Done: the guest runs at the destination.
    Completed,
    /// Cancelled before the commit request: the guest runs on at the source.
    Cancelled,
    /// Failed before the commit request: the guest runs on at the source.
    Failed,
    /// The guest dirtied memory faster than the limits allow; it runs on at the source.
    NotConverging,
}
