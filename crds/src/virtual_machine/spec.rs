//! The desired state of a virtual machine.
#![expect(
    unreachable_pub,
    reason = "the KubeSchema derive repeats each struct inside a function"
)]

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Affinity, Toleration, TopologySpreadConstraint};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::cloud_init::CloudInit;
use super::source::Source;
use super::status::VirtualMachineStatus;
use crate::{DrainPolicy, Duration, FailurePolicy, OnError, OnPanic, Quantity, RunPolicy};

/// What is asked of the virtual machine.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "bascule.dev",
    version = "v1alpha1",
    kind = "VirtualMachine",
    plural = "virtualmachines",
    shortname = "vm",
    category = "bascule",
    namespaced,
    status = "VirtualMachineStatus",
    derive = "PartialEq",
    doc = "A virtual machine that Bascule keeps available: it runs on some node, moves while it runs when that node is drained, and is started elsewhere when that node is lost. Never do two copies of it write to its disks.",
    printcolumn(name = "Status", type_ = "string", json_path = ".status.phase", description = "What the virtual machine is doing."),
    printcolumn(name = "Node", type_ = "string", json_path = ".status.node", description = "The node that it runs on."),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status", description = "Whether it is in the state that its spec asks for."),
    printcolumn(name = "Protected", type_ = "string", json_path = ".status.conditions[?(@.type==\"Protected\")].status", description = "Whether it would survive the loss of its node."),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason", priority = 1, description = "Why it is or is not ready."),
    printcolumn(name = "Unprotected", type_ = "string", json_path = ".status.conditions[?(@.type==\"Protected\")].reason", priority = 1, description = "Why it is or is not protected."),
    printcolumn(name = "Address", type_ = "string", json_path = ".status.interfaces[*].addresses[0]", priority = 1, description = "The first address of the guest that its agent tells."),
    printcolumn(name = "Volume", type_ = "string", json_path = ".spec.volume", priority = 1, description = "The SharedVolume that it lives on."),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.metadata.name.matches('^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$')").message("metadata.name must be a DNS label: at most 63 lower-case letters, digits and hyphens, because the names of its disks on the volume are made of it"),
    validation = Rule::new("!has(self.spec.boot.firmware) || (type(self.spec.memory) == int ? self.spec.memory >= 134217728 : !isQuantity(self.spec.memory) || quantity(self.spec.memory).compareTo(quantity('128Mi')) >= 0)").message("spec.memory: firmware needs at least 128Mi"),
    validation = Rule::new("!has(self.spec.boot.firmware) || (has(self.spec.disks) && self.spec.disks.size() > 0)").message("spec.disks: firmware boots a disk, and there is none"),
)]
pub struct VirtualMachineSpec {
    /// Whether the guest should run. Always: start it, and start it again whenever it ends.
    /// OnFailure: start it, and start it again unless the guest shut itself down. Stopped: shut it
    /// down by its agent or its power button, and force it off after availability.migration.shutdownTimeout.
    #[serde(default)]
    pub run_policy: RunPolicy,
    /// The number of virtual CPUs. A change takes effect at the guest's next start.
    #[serde(default)]
    pub cpu: Cpu,
    /// The guest's memory, for example 512Mi or 8Gi. At least 16Mi, at most 4Ti, a multiple of 2Mi.
    /// A change takes effect at the guest's next start.
    #[x_kube(
        validation = Rule::new("type(self) == int || isQuantity(self)").message("write a whole number of bytes with an optional suffix Ki, Mi, Gi, Ti, k, M, G or T, such as 512Mi or 20Gi"),
        validation = Rule::new("type(self) == int ? self >= 16777216 && self <= 4398046511104 : !isQuantity(self) || (quantity(self).compareTo(quantity('16Mi')) >= 0 && quantity(self).compareTo(quantity('4Ti')) <= 0)").message("a guest has at least 16Mi and at most 4Ti of memory"),
        validation = Rule::new("type(self) == int ? self % 2097152 == 0 : !isQuantity(self) || !quantity(self).isInteger() || quantity(self).asInteger() % 2097152 == 0").message("memory must be a multiple of 2Mi, for example 512Mi or 2Gi"),
    )]
    pub memory: Quantity,
    /// What the guest boots: by default the firmware, which boots the first disk that can.
    #[serde(default)]
    pub boot: Boot,
    /// The SharedVolume that the virtual machine lives on, by name. Cannot be changed.
    #[x_kube(validation = Rule::new("self == oldSelf").message("volume cannot be changed: create another VirtualMachine on the other volume and attach the kept disks there"))]
    #[schemars(length(min = 1, max = 253))]
    pub volume: String,
    /// The guest's disks, in the order in which the guest finds them. The set of disks cannot be
    /// changed after creation.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    #[x_kube(validation = Rule::new("self.size() == oldSelf.size() && self.all(d, oldSelf.exists(o, o.name == d.name))").message("disks cannot be added, removed or renamed after creation: create another VirtualMachine and attach the kept disks there"))]
    pub disks: Vec<Disk>,
    /// The guest's network interfaces, in the order in which the guest finds them. A change takes
    /// effect at the guest's next start.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    #[x_kube(validation = Rule::new("self.all(one, !has(one.mac) || self.exists_one(other, has(other.mac) && other.mac == one.mac))").message("two interfaces have the same mac: give each its own, or leave mac out"))]
    pub interfaces: Vec<Interface>,
    /// What cloud-init in the guest does at its first boot: users, keys, packages, commands, network.
    /// Given to the guest as a small read-only disk (cloud-init's data source NoCloud: a FAT file
    /// system with the label CIDATA), behind all disks and interfaces. The instance ID is the VirtualMachine's
    /// UID and the host name its name, so cloud-init does its first-boot work once, however often the
    /// guest moves or is started again. Can be added, changed and removed; the guest finds the change
    /// at its next start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cloud_init: Option<CloudInit>,
    /// Gives the guest a port for its agent, qemu-ga (package qemu-guest-agent): a virtio-console device with the
    /// port org.qemu.guest_agent.0. With an agent in the guest, the status tells its addresses, host name and
    /// operating system (status.guest and status.interfaces), it is shut down by the agent before the power
    /// button is pressed, and its clock is set after its memory was saved and restored. Takes effect at the
    /// guest's next start.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub guest_agent: bool,
    /// What happens when the guest's kernel panics, of which it tells by its pvpanic device: Linux does with the module
    /// pvpanic-mmio, which distributions load by themselves. Restart: the machine is reset on its node, as by a reset button;
    /// no restart is counted, and a guest that panics again and again waits longer and longer. Leave: the guest stays
    /// as it is, for a debugger or its own setting kernel.panic, and Ready is False with reason GuestPanicked until it is
    /// reset. A guest whose crash kernel (kdump) saves its memory is left alone whatever is set here: it resets itself
    /// then. Takes effect at the guest's next start.
    #[serde(default)]
    pub on_panic: OnPanic,
    /// What happens on a drain and on the loss of a node.
    #[serde(default)]
    pub availability: Availability,
    /// Where the virtual machine may run. Copied to the reservation pod that the scheduler places
    /// for it. A change takes effect with the next reservation.
    #[serde(default)]
    pub placement: Placement,
}

/// Virtual processors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Cpu {
    /// How many processors the guest sees, 1 to 64. The scheduler reserves this number divided by
    /// the chart's allocationRatio. A change takes effect at the guest's next start.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 64))]
    pub cores: i32,
}

/// What the guest boots: exactly one of firmware and kernel.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.kernel) != has(self.firmware)").message("set exactly one of firmware and kernel"),
    validation = Rule::new("has(self.kernel) || (!has(self.initrd) && (!has(self.cmdline) || self.cmdline == ''))").message("initrd and cmdline belong to a kernel: with firmware, the disk's boot loader has them"),
    validation = Rule::new("has(self.kernel) == has(oldSelf.kernel)").message("boot.kernel cannot be added or removed: it was copied to the volume when the VirtualMachine was created"),
    validation = Rule::new("has(self.initrd) == has(oldSelf.initrd)").message("boot.initrd cannot be added or removed: it was copied to the volume when the VirtualMachine was created"),
)]
pub struct Boot {
    /// UEFI firmware. It boots the first of the disks, in their order, that has an EFI system
    /// partition with \EFI\BOOT\BOOTX64.EFI, as disks of distributions have. It keeps no boot
    /// variables. Its console is the serial port. Needs at least 128Mi of memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<Firmware>,
    /// The kernel: an x86-64 Linux bzImage, or an ELF image with a PVH entry note, of at most
    /// 128Mi. Copied to the volume when the virtual machine is created, so that a restart on another
    /// node needs nothing but the volume. Cannot be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("self == oldSelf").message("boot.kernel cannot be changed: it was copied to the volume when the VirtualMachine was created"))]
    pub kernel: Option<Source>,
    /// The initial RAM disk, if the kernel wants one: a cpio archive, compressed or not, of at most
    /// 512Mi. Copied to the volume with the kernel. Cannot be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("self == oldSelf").message("boot.initrd cannot be changed: it was copied to the volume when the VirtualMachine was created"))]
    pub initrd: Option<Source>,
    /// The kernel's command line, for example "console=ttyS0 root=/dev/vda". A change takes effect
    /// at the guest's next start.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 2047))]
    pub cmdline: String,
}

impl Default for Boot {
    fn default() -> Self {
        Self {
            firmware: Some(Firmware {}),
            kernel: None,
            initrd: None,
            cmdline: String::new(),
        }
    }
}

/// UEFI firmware. There is nothing to set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Firmware {}

/// One disk of the guest: new and empty, new from an image, or a kept one.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!(has(self.source) && has(self.existing))").message("set source for a new disk or existing for a kept one, not both"),
    validation = Rule::new("has(self.existing) != has(self.size)").message("a new disk needs a size; a kept disk (existing) brings its own"),
    validation = Rule::new("has(self.size) == has(oldSelf.size) && (!has(self.size) || self.size == oldSelf.size) && has(self.source) == has(oldSelf.source) && (!has(self.source) || self.source == oldSelf.source) && has(self.existing) == has(oldSelf.existing) && (!has(self.existing) || self.existing == oldSelf.existing)").message("size, source and existing of a disk cannot be changed after creation; only readOnly, deletionPolicy and onError can"),
)]
pub struct Disk {
    /// The disk's name among this virtual machine's. On the volume it is called
    /// <namespace>/<virtual machine>.<name>. Names that begin with boot- are taken by kernel and
    /// initrd. Cannot be changed.
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$') && !self.startsWith('boot-')").message("a disk's name is a DNS label (lower-case letters, digits, hyphens) and does not begin with boot-"))]
    pub name: String,
    /// The size that the guest sees, for example 20Gi. At least 1Mi, at most 64Ti. Rounded up to
    /// whole extents of the volume (1Mi by default).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    // A list of one, because Kubernetes estimates that comparing bare types costs as much as
    // comparing the longest text, and there may be 16 disks.
    #[x_kube(validation = Rule::new("[type(self)] == [int] || isQuantity(self)").message("write a whole number of bytes with an optional suffix Ki, Mi, Gi, Ti, k, M, G or T, such as 512Mi or 20Gi"), validation = Rule::new("[type(self)] == [int] ? self >= 1048576 && self <= 70368744177664 : [quantity(self)].all(size, size.compareTo(quantity('1Mi')) >= 0 && size.compareTo(quantity('64Ti')) <= 0)").message("a disk has at least 1Mi and at most 64Ti"))]
    pub size: Option<Quantity>,
    /// The image that a new disk begins with: raw or qcow2, plain or compressed with gzip, xz or zstd,
    /// told apart by its contents. Other formats, archives, and a qcow2 image that has a backing file,
    /// is encrypted or is larger than the disk are refused. Without it the disk is empty and reads as
    /// zeroes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// A disk that an earlier virtual machine of this namespace left on the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub existing: Option<ExistingDisk>,
    /// Whether the guest may only read the disk. A change takes effect at the guest's next start.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    /// What becomes of the disk when the VirtualMachine is deleted. Keep: it stays on the volume,
    /// is listed in the SharedVolume's status, and can be attached again with existing. Delete: its
    /// contents are gone for good.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
    /// What happens when the storage fails a read or a write of this disk, for example at a bad sector
    /// or when a thin volume is full. Report: the guest gets the error. Pause: the guest is paused, does
    /// not get the error, and Ready says which disk failed and how. Once the storage is repaired, set
    /// Report: the request is tried again, and the guest runs on; if it fails again, the guest gets
    /// the error. Pause takes effect at the guest's next start. A failed flush is always reported. A
    /// lost path to the storage is no such error: the guest waits for it.
    #[serde(default)]
    pub on_error: OnError,
}

/// A disk that a deleted virtual machine of the same namespace left on the volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExistingDisk {
    /// Its name on the volume without the namespace, <virtual machine>.<disk>, as the
    /// SharedVolume's status.keptDisks lists it.
    #[schemars(length(min = 3, max = 127))]
    pub name: String,
}

/// What becomes of a disk when its VirtualMachine is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DeletionPolicy {
    /// It stays on the volume.
    #[default]
    Keep,
    /// It is deleted.
    Delete,
}

/// One network interface of the guest.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Interface {
    /// The interface's name in this document; the guest chooses its own.
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')").message("an interface's name is a DNS label: lower-case letters, digits, hyphens"))]
    pub name: String,
    /// The network that it is attached to: a bridge of the node, by the name that an administrator
    /// gave it in the chart's value node.bridges, or with --bridge NAME=DEVICE without Kubernetes.
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')").message("bridge is a name from the administrator's allow-list: lower-case letters, digits and hyphens"))]
    pub bridge: String,
    /// The interface's unicast MAC address, for example 02:00:00:12:34:56. By default one is
    /// derived from the VirtualMachine's UID, and stays the same for its life. No two interfaces of
    /// a virtual machine may have the same; where two virtual machines have the same on one
    /// network, the condition MacConflict of both says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 17))]
    #[x_kube(validation = Rule::new("self.matches('^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$') && self != '00:00:00:00:00:00'").message("mac must be a unicast address of six lower-case hexadecimal bytes, such as 02:00:00:12:34:56"))]
    pub mac: Option<String>,
}

/// What happens on a drain and on the loss of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Availability {
    /// What happens when the node is drained, or the virtual machine evicted or preempted.
    /// LiveMigrate: move it while it runs, and fall back to QuickMigrate, then to Shutdown.
    /// QuickMigrate: pause it, save it to the volume, go on elsewhere; fall back to Shutdown.
    /// Shutdown: shut it down and start it elsewhere.
    #[serde(default)]
    pub on_drain: DrainPolicy,
    /// What happens when the node is lost. Restart: start it elsewhere as soon as the volume grants
    /// it. Leave: wait for the node.
    #[serde(default)]
    pub on_node_failure: FailurePolicy,
    /// Limits of the moves that a drain makes.
    #[serde(default)]
    pub migration: MigrationLimits,
    /// How often a guest that ends by itself is started again.
    #[serde(default)]
    pub restart: RestartLimits,
}

/// Limits of a move. The reservation pod's termination grace period is the sum of the three
/// timeouts and a margin, so that a drain waits for all of them.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MigrationLimits {
    /// How long the guest may stand still at the end of a live migration, at least 1ms. The move
    /// waits until it predicts less.
    #[serde(default = "default_downtime")]
    #[x_kube(validation = Rule::new("!self.matches('^[0-9hms]+$') || duration(self) >= duration('1ms')").message("downtime must be at least 1ms"))]
    pub downtime: Duration,
    /// How long a live migration may take before the fallback is tried, finding a node included.
    #[serde(default = "default_live_timeout")]
    #[x_kube(validation = Rule::new("!self.matches('^[0-9hms]+$') || (duration(self) >= duration('1s') && duration(self) <= duration('24h'))").message("liveTimeout must be between 1s and 24h"))]
    pub live_timeout: Duration,
    /// How long a quick migration may take before the fallback is tried.
    #[serde(default = "default_quick_timeout")]
    #[x_kube(validation = Rule::new("!self.matches('^[0-9hms]+$') || (duration(self) >= duration('1s') && duration(self) <= duration('24h'))").message("quickTimeout must be between 1s and 24h"))]
    pub quick_timeout: Duration,
    /// How long the guest has to shut down after it was told to before it is forced
    /// off.
    #[serde(default = "default_shutdown_timeout")]
    #[x_kube(validation = Rule::new("!self.matches('^[0-9hms]+$') || (duration(self) >= duration('1s') && duration(self) <= duration('24h'))").message("shutdownTimeout must be between 1s and 24h"))]
    pub shutdown_timeout: Duration,
    /// The bandwidth that a live migration may use, in bytes per second, for example 100M. No limit
    /// by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("type(self) == int || isQuantity(self)").message("write a whole number of bytes with an optional suffix Ki, Mi, Gi, Ti, k, M, G or T, such as 512Mi or 20Gi"), validation = Rule::new("type(self) == int ? self >= 1048576 : !isQuantity(self) || quantity(self).compareTo(quantity('1Mi')) >= 0").message("bandwidth must be at least 1Mi (bytes per second)"))]
    pub bandwidth: Option<Quantity>,
}

/// How often a guest that ends by itself is started again.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RestartLimits {
    /// How many restarts there may be within the window. After that the virtual machine stays
    /// down, with reason RestartsExhausted, until the window has passed. A restart after the loss
    /// of a node does not count.
    #[serde(default = "default_attempts_max")]
    #[schemars(range(min = 0, max = 100))]
    pub attempts_max: i32,
    /// The window in which restarts are counted.
    #[serde(default = "default_window")]
    #[x_kube(validation = Rule::new("!self.matches('^[0-9hms]+$') || duration(self) >= duration('1s')").message("window must be at least 1s"))]
    pub window: Duration,
    /// The wait before the second restart in a window; it doubles with each further one.
    #[serde(default = "default_backoff")]
    pub backoff: Duration,
}

/// Where the virtual machine may run: as in a pod's spec.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// Labels that the node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Affinity and anti-affinity to nodes and pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,
    /// Taints that the virtual machine tolerates. It always tolerates not-ready and unreachable
    /// nodes: an isolated node is not a reason to leave it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub tolerations: Vec<Toleration>,
    /// How virtual machines that match each other spread over nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub topology_spread_constraints: Vec<TopologySpreadConstraint>,
    /// The PriorityClass of the reservation pod. A preempted virtual machine moves as in a drain.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 253))]
    pub priority_class_name: String,
}

impl Default for Cpu {
    fn default() -> Self {
        Self { cores: one() }
    }
}

impl Default for MigrationLimits {
    fn default() -> Self {
        Self {
            downtime: default_downtime(),
            live_timeout: default_live_timeout(),
            quick_timeout: default_quick_timeout(),
            shutdown_timeout: default_shutdown_timeout(),
            bandwidth: None,
        }
    }
}

impl Default for RestartLimits {
    fn default() -> Self {
        Self {
            attempts_max: default_attempts_max(),
            window: default_window(),
            backoff: default_backoff(),
        }
    }
}

const fn one() -> i32 {
    1
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_std(std::time::Duration::from_secs(seconds))
}

/// What people call "no interruption": TCP does not even retransmit twice.
fn default_downtime() -> Duration {
    Duration::from_std(std::time::Duration::from_millis(300))
}

/// A guess: room for tens of GiB over a 10 Gbit/s network.
fn default_live_timeout() -> Duration {
    seconds(300)
}

/// A guess: tens of GiB written to and read from a SAN.
fn default_quick_timeout() -> Duration {
    seconds(180)
}

/// What systemd gives a unit to stop, 90 s, and a little for the rest of the way down.
fn default_shutdown_timeout() -> Duration {
    seconds(120)
}

const fn default_attempts_max() -> i32 {
    5
}

fn default_window() -> Duration {
    seconds(600)
}

fn default_backoff() -> Duration {
    seconds(10)
}
