//! What is known of a virtual machine.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Owner, Phase, Quantity};

/// The observed state of the virtual machine. The volume's ownership record decides which node may
/// run it; this is a report of that record.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VirtualMachineStatus {
    /// The generation of the spec that this status was computed from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// What it is doing, in one word, for people. Programs read the conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// The node that it runs on, as last reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The slot and generation that own it on the volume, and the epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ownership: Option<Ownership>,
    /// The VirtualMachineMigration that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<String>,
    /// The reservation pods that the operator has made for it. No other pod counts as one, whatever its
    /// labels and annotations say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["uid"]))]
    pub reservations: Vec<ReservationStatus>,
    /// When the guest was last started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When the guest was last restarted because it had ended by itself: the restart budget counts
    /// these. Those outside the window are forgotten.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100))]
    pub recent_restarts: Vec<Time>,
    /// When the guest was requested to shut down: it is forced off
    /// availability.migration.shutdownTimeout later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopping_since: Option<Time>,
    /// The guest shut itself down and runPolicy is OnFailure: it stays down until runPolicy has
    /// been Stopped or Always for a moment.
    #[serde(default)]
    pub completed: bool,
    /// How often the guest's machine was reset since the guest was started: reboots of the guest and
    /// triple faults. It stays on its node meanwhile, no restart is counted, and a changed spec is not
    /// applied.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub resets: i32,
    /// How often the guest's kernel has panicked since the guest was started: as often as it has told by its pvpanic
    /// device. spec.onPanic says what that does.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub panics: i32,
    /// When the operator last learned of a panic of the guest's kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_panic: Option<Time>,
    /// Why the guest last ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<String>,
    /// Its disks, kernel and initrd on the volume.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 18), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub disks: Vec<DiskStatus>,
    /// The network interfaces, in the order of spec.interfaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 18), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub interfaces: Vec<InterfaceStatus>,
    /// What the agent in the guest says of it; none while no agent answers. Whoever controls the guest
    /// chooses these texts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestStatus>,
    /// Ready, Protected, Imported, RestartRequired, GuestAgent if spec.guestAgent asks for one, and
    /// MacConflict while there is one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Who owns a virtual machine on its volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Ownership {
    /// The owner; none when the virtual machine is stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
    /// Rises with every transfer of the ownership. Text, because it may exceed what JSON numbers
    /// hold exactly.
    pub epoch: String,
}

/// A pod that holds CPU and memory for the virtual machine in the scheduler.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReservationStatus {
    /// The pod's name.
    pub name: String,
    /// The pod's UID: another pod of that name is not it.
    pub uid: String,
    /// The VirtualMachineMigration that it was made for; none where the guest runs or is to be started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<String>,
    /// SHA-256 of the spec that it was made for, in hexadecimal.
    pub spec_digest: String,
}

/// A disk, kernel or initrd on the volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DiskStatus {
    /// Its name in the spec; boot-kernel and boot-initrd for kernel and initrd.
    pub name: String,
    /// Whether it is there.
    pub state: DiskState,
    /// Its size on the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<Quantity>,
    /// How much of its image has been downloaded, as its source has it, while it is being imported. A
    /// qcow2 image is downloaded whole before its disk is filled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downloaded: Option<Quantity>,
    /// How much of the disk, from its beginning, is filled, while its image is being imported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub imported: Option<Quantity>,
    /// How many attempts to import it have failed, until it is there.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub failed_imports: i32,
    /// When the next attempt to import it is made. None after a failed attempt means that the same
    /// image would fail again: it is not tried again before the spec is changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_import: Option<Time>,
    /// What went wrong in the last attempt.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(count: &i32) -> bool {
    *count == 0
}

/// Whether a disk is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DiskState {
    /// Not yet created.
    Pending,
    /// Its image is being copied.
    Importing,
    /// It is complete and verified.
    Ready,
    /// It could not be made, for the reason in the message.
    Failed,
}

/// One network interface, as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InterfaceStatus {
    /// Its name in the spec.
    pub name: String,
    /// The MAC address of the spec, or one derived from the virtual machine's UID.
    pub mac: String,
    /// The addresses of the guest's interface with this MAC address, IPv4 first, as the agent in the
    /// guest says; none while no agent answers. Link-local addresses of IPv6 are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(max = 45)))]
    pub addresses: Vec<String>,
}

/// What the agent in the guest says of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GuestStatus {
    /// Its host name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub host_name: String,
    /// Its operating system.
    #[serde(default)]
    pub os: GuestOsStatus,
    /// The release of the agent.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub agent_version: String,
}

/// An operating system, as its os-release file names it. Empty where the guest does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GuestOsStatus {
    /// Such as debian.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// Such as 13.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// Such as Debian GNU/Linux 13 (trixie).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pretty_name: String,
    /// The release of the kernel that runs.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kernel: String,
}
