//! The `SharedVolume` kind.
#![expect(
    unreachable_pub,
    reason = "the KubeSchema derive repeats each struct inside a function"
)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Duration, Owner, Quantity};

/// What is asked of the volume.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "bascule.dev",
    version = "v1alpha1",
    kind = "SharedVolume",
    plural = "sharedvolumes",
    shortname = "sv",
    category = "bascule",
    status = "SharedVolumeStatus",
    derive = "PartialEq",
    doc = "One block device that several nodes reach at the same time, and that carries the disks of many virtual machines. On it is recorded which node may run which of them.",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status", description = "Whether virtual machines can run on it."),
    printcolumn(name = "Fencing", type_ = "string", json_path = ".spec.fencing.mode", description = "How a node that stopped responding is fenced, that is, kept from writing."),
    printcolumn(name = "Nodes", type_ = "integer", json_path = ".status.directNodes", description = "How many nodes reach it directly."),
    printcolumn(name = "Coordinator", type_ = "string", json_path = ".status.coordinator", description = "The node that keeps its metadata."),
    printcolumn(name = "Capacity", type_ = "string", json_path = ".status.capacity"),
    printcolumn(name = "Free", type_ = "string", json_path = ".status.free"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason", priority = 1, description = "Why it is or is not ready."),
    printcolumn(name = "Volume-ID", type_ = "string", json_path = ".status.volumeId", priority = 1, description = "The identity in its superblock."),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.metadata.name.matches('^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$')").message("metadata.name must be a DNS label: at most 63 lower-case letters, digits and hyphens"),
)]
pub struct SharedVolumeSpec {
    /// Where the volume is. Exactly one of device and file. Cannot be changed.
    #[x_kube(validation = Rule::new("self == oldSelf").message("backing cannot be changed: create another SharedVolume"))]
    pub backing: Backing,
    /// What to do with a device that is not a volume yet. IfBlank: make it one, provided that
    /// nothing at all is on it. Never: wait until an administrator runs bascule-node volume format.
    #[serde(default)]
    pub initialize: Initialize,
    /// If given, only the volume with this identity is accepted, on every node. By default the
    /// first one that is found there is, and status.volumeId names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 36))]
    #[x_kube(validation = Rule::new("self.matches('^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$')").message("volumeId must be a UUID in lower case, as status.volumeId or bascule-volume check prints it"))]
    pub volume_id: Option<String>,
    /// How a node that stopped responding is fenced, that is, kept from writing.
    #[serde(default)]
    pub fencing: Fencing,
    /// The timing of leases. Written to the volume when it is formatted. Cannot be changed.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("timing cannot be changed: it was written to the volume when that was formatted"))]
    pub timing: Timing,
    /// The unit in which space is given to disks. Written to the volume when it is formatted.
    /// Cannot be changed.
    #[serde(default = "default_extent_size")]
    #[x_kube(validation = Rule::new("self == oldSelf").message("extentSize cannot be changed: it was written to the volume when that was formatted"))]
    #[x_kube(validation = Rule::new("type(self) == int ? self in [1048576, 2097152, 4194304, 8388608, 16777216, 33554432, 67108864] : self in ['1Mi', '2Mi', '4Mi', '8Mi', '16Mi', '32Mi', '64Mi']").message("extentSize must be 1Mi, 2Mi, 4Mi, 8Mi, 16Mi, 32Mi or 64Mi"))]
    pub extent_size: Quantity,
}

/// Where a volume is: exactly one of device and file.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.device) != has(self.file)").message("set exactly one of device and file"))]
pub struct Backing {
    /// A block device that all nodes reach, for example a LUN of a SAN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<BackingDevice>,
    /// A file, for one host or a lab. Virtual machines on it are never called protected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<BackingFile>,
}

/// A block device that every node of the volume can read and write.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackingDevice {
    /// Its path on every node, one that names the same device everywhere and after every boot, for
    /// example /dev/disk/by-id/wwn-0x6001405. Every node checks the identity that it finds there.
    #[schemars(length(max = 4096))]
    #[x_kube(validation = Rule::new("self.startsWith('/dev/') && !self.contains('..')").message("path must be an absolute path below /dev, preferably /dev/disk/by-id/…"))]
    pub path: String,
}

/// A file as the backing of a volume: for one host, or for a lab.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackingFile {
    /// Its path on the nodes. It must exist and have its full size.
    #[schemars(length(max = 4096))]
    #[x_kube(validation = Rule::new("self.startsWith('/') && !self.contains('..')").message("path must be absolute"))]
    pub path: String,
}

/// What to do with a device that is not a volume yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Initialize {
    /// Make it one if nothing is on it.
    #[default]
    IfBlank,
    /// Leave it alone.
    Never,
}

/// How a node that stopped responding is fenced, that is, kept from writing.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Fencing {
    /// Watchdog: every node has a hardware watchdog that resets it when it can no longer hold its
    /// lease; after the safe time its virtual machines start elsewhere. LeaseOnly: no hardware
    /// proves that an unresponsive node has stopped; its virtual machines start elsewhere only after a
    /// manual fencing confirmation. PersistentReservation: SCSI-3 reservations keep it out; not implemented yet, and
    /// refused with the condition FencingAvailable.
    #[serde(default)]
    pub mode: FencingMode,
    /// Accept the Linux softdog as the watchdog. It does not fire when the machine hangs, so this
    /// is for labs.
    #[serde(default)]
    pub allow_softdog: bool,
    /// Take the taint node.kubernetes.io/out-of-service on a node as an administrator's fencing confirmation that
    /// the node is off.
    #[serde(default)]
    pub trust_out_of_service_taint: bool,
}

/// How a node that stopped responding is fenced, that is, kept from writing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum FencingMode {
    /// Hardware watchdogs.
    #[default]
    Watchdog,
    /// Nothing but leases and a manual fencing confirmation.
    LeaseOnly,
    /// SCSI-3 persistent reservations; refused for now.
    PersistentReservation,
}

/// The timing of leases. A virtual machine of a lost node starts elsewhere after three leases, plus
/// watchdogTimeout, plus settle, at the earliest: 27 seconds by default.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Timing {
    /// How long a node may write after it last renewed its lease, 1s to 60s.
    #[serde(default = "default_lease")]
    #[x_kube(validation = Rule::new("!self.matches('^[0-9hms]+$') || (duration(self) >= duration('1s') && duration(self) <= duration('60s'))").message("lease must be between 1s and 60s"))]
    pub lease: Duration,
    /// After how long without a lease the watchdog resets the node, 1s to 5m.
    #[serde(default = "default_watchdog_timeout")]
    #[x_kube(validation = Rule::new("!self.matches('^[0-9hms]+$') || (duration(self) >= duration('1s') && duration(self) <= duration('5m'))").message("watchdogTimeout must be between 1s and 5m"))]
    pub watchdog_timeout: Duration,
    /// How long after a reset a write that was under way may still reach the device, up to 5m. Ask
    /// the maker of the storage.
    #[serde(default = "default_settle")]
    #[x_kube(validation = Rule::new("!self.matches('^[0-9hms]+$') || duration(self) <= duration('5m')").message("settle must be at most 5m"))]
    pub settle: Duration,
}

/// What is known of the volume.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SharedVolumeStatus {
    /// The generation of the spec that this status answers to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The identity in the superblock. Once known, every node must find the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume_id: Option<String>,
    /// The one node that was asked to format the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub formatting_node: Option<String>,
    /// The node that keeps the metadata at present. Its loss stops no guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coordinator: Option<String>,
    /// The size of the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<Quantity>,
    /// What no disk has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free: Option<Quantity>,
    /// How many nodes reach the volume directly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct_nodes: Option<i32>,
    /// How each node reaches the volume.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub nodes: Vec<NodeAccess>,
    /// Disks that deleted virtual machines left here. The first 200, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 200), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["namespace", "name"]))]
    pub kept_disks: Vec<KeptDisk>,
    /// Virtual machines that are recorded on the volume and have no VirtualMachine object, for
    /// example after etcd was restored. They are never started and never deleted by themselves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 200))]
    pub unclaimed_virtual_machines: Vec<UnclaimedVirtualMachine>,
    /// Ready, FencingAvailable.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// How a node reaches the volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeAccess {
    /// The name of the Kubernetes node.
    pub name: String,
    /// How it reaches the volume.
    pub state: NodeAccessState,
    /// Why, when it does not reach it directly.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Its slot and generation: what an administrator names when confirming that it is dead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<Owner>,
    /// Whether a hardware watchdog vouches for it.
    #[serde(default)]
    pub watchdog: bool,
    /// Why no guest can run on it although it reaches the volume, for example because /dev/kvm is
    /// missing there.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kvm_error: String,
    /// Since when it has been in this state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
}

/// How a node reaches a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum NodeAccessState {
    /// It reads and writes the device itself.
    Direct,
    /// Its lease has lapsed: its guests' disks wait.
    Paused,
    /// It does not reach the device.
    Unavailable,
}

/// A disk that a deleted virtual machine left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeptDisk {
    /// The namespace that may attach it again.
    pub namespace: String,
    /// Its name, <virtual machine>.<disk>: what to write in disks[].existing.name.
    pub name: String,
    /// The size that a guest sees.
    pub size: Quantity,
}

/// A virtual machine on the volume without a VirtualMachine object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UnclaimedVirtualMachine {
    /// The UID that it is recorded under.
    pub uid: String,
    /// Its name there, <namespace>/<name>.
    pub name: String,
    /// The node that runs it, if one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease: default_lease(),
            watchdog_timeout: default_watchdog_timeout(),
            settle: default_settle(),
        }
    }
}

/// One of these passes before an unresponsive node is suspected; renewals are several in one.
fn default_lease() -> Duration {
    Duration::from_std(std::time::Duration::from_secs(4))
}

/// Most hardware watchdogs count whole seconds; less than this resets healthy nodes under load.
fn default_watchdog_timeout() -> Duration {
    Duration::from_std(std::time::Duration::from_secs(10))
}

/// A guess for Fibre Channel and iSCSI in one room.
fn default_settle() -> Duration {
    Duration::from_std(std::time::Duration::from_secs(5))
}

fn default_extent_size() -> Quantity {
    Quantity::from_bytes(1 << 20)
}
