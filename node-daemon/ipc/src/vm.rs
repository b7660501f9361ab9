//! `vm.sock`: what `bascule-node` asks of a `bascule-vm`, and the configuration it starts it with.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use bascule_types::{AttemptId, Bytes, Epoch, Owner, VmUid};
use serde::{Deserialize, Serialize};

/// What a `bascule-vm` is started with, in `config.json`. Everything is resolved: names have become
/// paths and numbers, the row is already owned (unless the VM is incoming).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// Format version of this document; [`VmConfig::VERSION`].
    pub version: u32,
    /// The VM.
    pub uid: VmUid,
    /// `<namespace>/<name>`.
    pub name: String,
    /// Virtual CPUs.
    pub cpus: u8,
    /// Guest RAM.
    pub memory: Bytes,
    /// What it boots.
    pub boot: Boot,
    /// Its disks, in the order of their PCI slots.
    pub disks: Vec<DiskConfig>,
    /// Its network interfaces, in the order of their PCI slots.
    pub interfaces: Vec<InterfaceConfig>,
    /// The volume that is its home; none only for a VM without any (embedded mode, tests).
    pub home: Option<Home>,
    /// How it begins.
    pub start: StartMode,
    /// The folder of the node's identity ([`crate::tls`]), for migration streams.
    pub tls_dir: Option<PathBuf>,
}

impl VmConfig {
    /// The version that this release writes.
    pub const VERSION: u32 = 1;
}

/// The volume a VM lives on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Home {
    /// The socket of the node's `bascule-volume` for it.
    pub socket: PathBuf,
    /// The tenure that this process runs under; for an incoming VM the slot and generation that it
    /// will have, and the epoch is the source's.
    pub owner: Owner,
    /// Its epoch.
    pub epoch: Epoch,
}

/// What a VM boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// The kernel: bzImage, or ELF with a PVH note.
    pub kernel: ImageSource,
    /// The initial RAM disk.
    pub initrd: Option<ImageSource>,
    /// The kernel command line.
    pub cmdline: String,
}

/// Where an image is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageSource {
    /// A disk row of the VM on its home volume, whose size is the image's length.
    Volume {
        /// The row's name, `<namespace>/<disk>`.
        disk: String,
    },
    /// A file (a VM without a home).
    File {
        /// Its path.
        path: PathBuf,
    },
}

/// One virtio-blk disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// The name in the VM's spec; the guest sees a serial number made from it.
    pub name: String,
    /// Where its blocks are.
    pub source: DiskSource,
}

/// Where a disk's blocks are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskSource {
    /// A disk row of the home volume, by its name `<namespace>/<disk>`.
    Volume {
        /// The row's name.
        disk: String,
    },
    /// A file (a VM without a home).
    File {
        /// Its path.
        path: PathBuf,
        /// Whether the guest may only read.
        read_only: bool,
    },
}

/// One virtio-net interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceConfig {
    /// The tap device; it exists and is attached to its bridge.
    pub tap: String,
    /// The MAC address.
    pub mac: [u8; 6],
    /// The MTU of its bridge in bytes, which the guest is told; none when it is not known.
    #[serde(default)]
    pub mtu: Option<u16>,
}

/// How a `bascule-vm` begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StartMode {
    /// Boot at once.
    Boot,
    /// Wait for a live migration on this address; port 0 takes a free one ([`VmStatus::listening`]).
    Incoming {
        /// The address to listen on.
        listen: SocketAddr,
        /// The attempt that may come in; any other is refused.
        attempt: AttemptId,
    },
    /// Restore from the saved state on the home volume, and drop it when the guest runs.
    Restore,
}

/// A request to a `bascule-vm`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// How the VM does.
    Status,
    /// What it is that the VM waits for at this moment. Since version 2.
    WaitsFor,
    /// Press the ACPI power button.
    PowerButton,
    /// Stop the guest now, drain its devices, release the row. Answered when that is done, or, when
    /// a device or the volume takes long, when it has begun: [`Request::WaitsFor`] then tells more.
    Stop,
    /// Pause the guest. Answered as [`Request::Stop`] is.
    Pause,
    /// Let a paused guest go on.
    Resume,
    /// Move live to another node. Answered at once; [`VmStatus::migration`] tells how it goes.
    MigrateLive {
        /// The attempt.
        attempt: AttemptId,
        /// The destination's `bascule-vm`.
        peer: SocketAddr,
        /// Who will own the VM there.
        to: Owner,
        /// Limits.
        limits: MigrationLimits,
    },
    /// Save RAM and state to the volume and transfer the row (or release it, without `to`).
    /// Answered at once.
    MigrateQuick {
        /// The attempt.
        attempt: AttemptId,
        /// Who will own the VM; none to release it.
        to: Option<Owner>,
    },
    /// Give a migration up, if its commit request has not been sent.
    CancelMigration {
        /// The attempt.
        attempt: AttemptId,
    },
    /// Announce the guest's interfaces again (RARP and gratuitous ARP).
    Announce,
    /// The guest's serial console: the answer carries one end of a socket pair, which is a stream
    /// of raw bytes in both directions. A later one takes over from an earlier one.
    Console,
    /// End the process; refused unless the VM is stopped, departed, or never ran.
    Exit,
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    /// To [`Request::Status`].
    Status(Box<VmStatus>),
    /// To [`Request::WaitsFor`], in words for a person; none when it waits for nothing.
    WaitsFor(Option<String>),
    /// Begun, or done.
    Accepted,
    /// Not possible now, and why, in words for a person. Nothing was changed.
    Refused {
        /// The reason.
        reason: String,
    },
}

/// How a VM does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    /// The VM.
    pub uid: VmUid,
    /// The release of this process.
    pub release: String,
    /// The process.
    pub pid: u32,
    /// Where it stands.
    pub state: VmState,
    /// The tenure it runs under.
    pub owner: Option<Owner>,
    /// Its epoch.
    pub epoch: Epoch,
    /// Where an incoming VM listens.
    pub listening: Option<SocketAddr>,
    /// The present or last migration.
    pub migration: Option<MigrationStatus>,
    /// Whether writes stall because the I/O gate is closed.
    pub io_stalled: bool,
    /// Guest addresses, as far as known.
    pub addresses: Vec<IpAddr>,
}

/// What a process that ends leaves in `state.json` of its run directory: why it is or will soon be
/// gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastState {
    /// The VM.
    pub uid: VmUid,
    /// Where it stood.
    pub state: VmState,
}

/// Where a VM process stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// Being built or restored.
    Starting,
    /// Waiting for, or receiving, a migration.
    Incoming,
    /// The guest runs.
    Running,
    /// The guest is paused on request or for a migration's last step.
    Paused,
    /// The commit request was sent and its outcome is not known yet: nothing runs here.
    InDoubt,
    /// The guest runs on another node now. This process will never run it again.
    Departed,
    /// The guest is off.
    Stopped(StopReason),
}

/// Why a guest is off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopReason {
    /// It shut itself down.
    GuestShutdown,
    /// It asked for a reset: the VM is to be started again.
    GuestReset,
    /// It was told to.
    Requested,
    /// It did something no machine survives, such as a triple fault.
    GuestFault {
        /// What.
        what: String,
    },
    /// This process failed.
    Failed {
        /// What.
        what: String,
    },
}

/// What a live migration may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationLimits {
    /// The guest is stopped only when the predicted blackout is at most this, in milliseconds.
    pub downtime_ms_max: u64,
    /// A guest that has not converged after this has not converged, in milliseconds.
    pub total_ms_max: u64,
    /// The most bytes a second; none for no cap.
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

/// How a migration goes, or went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// The attempt.
    pub attempt: AttemptId,
    /// Where it stands.
    pub phase: MigrationPhase,
    /// Pre-copy rounds begun.
    pub rounds: u32,
    /// Bytes sent or received.
    pub bytes: Bytes,
    /// Bytes of memory still to send.
    pub remaining: Bytes,
    /// The blackout that the controller expects, in milliseconds.
    pub downtime_ms_predicted: Option<u64>,
    /// From stopping the source's vCPUs to running the destination's: only the destination's
    /// process knows its end, so the source reports until the destination said that it runs.
    pub downtime_ms: Option<u64>,
    /// From the request to the end, in milliseconds.
    pub total_ms: u64,
    /// How long each phase took, in the order in which they came.
    pub timings: Vec<(MigrationPhase, u64)>,
    /// Why it failed.
    pub failure: Option<String>,
}

/// The phases of a migration, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MigrationPhase {
    /// Connecting, comparing configurations, building the destination.
    Preparing,
    /// Memory is copied while the guest runs.
    PreCopy,
    /// The source is stopped; the last pages and the state are sent.
    Stopping,
    /// The ownership transfer was asked for.
    Committing,
    /// Done: the guest runs at the destination.
    Completed,
    /// Given up before the commit request: the guest runs on at the source.
    Cancelled,
    /// Failed before the commit request: the guest runs on at the source.
    Failed,
    /// The guest dirtied memory faster than the limits allow; it runs on at the source.
    NotConverging,
}
