//! The `VirtualMachineMigration` kind.
#![expect(
    unreachable_pub,
    clippy::duplicated_attributes,
    reason = "the KubeSchema derive repeats each struct, with its attributes, inside a function"
)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Duration, MigrationMode, MigrationPhase, Quantity};

/// Which virtual machine to migrate, where to and how.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "bascule.dev",
    version = "v1alpha1",
    kind = "VirtualMachineMigration",
    plural = "virtualmachinemigrations",
    shortname = "vmmig",
    category = "bascule",
    namespaced,
    status = "VirtualMachineMigrationStatus",
    derive = "PartialEq",
    doc = "One attempt to move a virtual machine to another node. Drains create these too, so everything that ever moved is on record. A failed or cancelled attempt leaves the guest running where it was.",
    printcolumn(name = "VM", type_ = "string", json_path = ".spec.virtualMachine"),
    printcolumn(
        name = "Source",
        type_ = "string",
        json_path = ".status.source",
        description = "The node that it leaves."
    ),
    printcolumn(
        name = "Target",
        type_ = "string",
        json_path = ".status.target",
        description = "The node that it goes to."
    ),
    printcolumn(
        name = "Progress",
        type_ = "string",
        json_path = ".status.progress.percent"
    ),
    printcolumn(
        name = "Downtime",
        type_ = "string",
        json_path = ".status.progress.measuredDowntime",
        description = "How long the guest's virtual CPUs were stopped."
    ),
    printcolumn(name = "Status", type_ = "string", json_path = ".status.phase"),
    printcolumn(
        name = "Mode",
        type_ = "string",
        json_path = ".spec.mode",
        priority = 1
    ),
    printcolumn(
        name = "Rounds",
        type_ = "integer",
        json_path = ".status.progress.rounds",
        priority = 1
    ),
    printcolumn(
        name = "Transferred",
        type_ = "string",
        json_path = ".status.progress.transferred",
        priority = 1
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Complete\")].reason",
        priority = 1
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    )
)]
#[x_kube(
    validation = Rule::new("self.virtualMachine == oldSelf.virtualMachine && self.mode == oldSelf.mode && has(self.target) == has(oldSelf.target) && (!has(self.target) || self.target == oldSelf.target)").message("a migration is one attempt and cannot be changed: cancel it and create another"),
    validation = Rule::new("!oldSelf.cancel || self.cancel").message("a cancelled migration cannot be taken up again: create another"),
)]
pub struct VirtualMachineMigrationSpec {
    /// The name of the VirtualMachine, in the same namespace.
    #[schemars(length(min = 1, max = 63))]
    pub virtual_machine: String,
    /// Live: the guest runs on while its memory is copied, and stands still for milliseconds.
    /// Quick: the guest is paused, saved to the volume, and goes on elsewhere.
    #[serde(default)]
    pub mode: MigrationMode,
    /// The node to go to. By default the scheduler chooses one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub target: Option<String>,
    /// How long the guest may stand still at the end of a live migration. By default as the
    /// VirtualMachine's availability.migration.downtime says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("!self.matches('^[0-9hms]+$') || duration(self) >= duration('1ms')").message("downtime must be at least 1ms"))]
    pub downtime: Option<Duration>,
    /// How long the attempt may take, finding a node included. By default as the VirtualMachine's
    /// availability.migration says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("!self.matches('^[0-9hms]+$') || (duration(self) >= duration('1s') && duration(self) <= duration('24h'))").message("timeout must be between 1s and 24h"))]
    pub timeout: Option<Duration>,
    /// The bandwidth that the move may use, in bytes per second. By default as the VirtualMachine's
    /// availability.migration.bandwidth says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("type(self) == int || isQuantity(self)").message("write a whole number of bytes with an optional suffix Ki, Mi, Gi, Ti, k, M, G or T, such as 512Mi or 20Gi"), validation = Rule::new("type(self) == int ? self >= 1048576 : !isQuantity(self) || quantity(self).compareTo(quantity('1Mi')) >= 0").message("bandwidth must be at least 1Mi (bytes per second)"))]
    pub bandwidth: Option<Quantity>,
    /// Set to true to give the attempt up. The guest stays where it is, unless the attempt has
    /// passed its commit point.
    #[serde(default)]
    pub cancel: bool,
}

/// The observed state of the migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VirtualMachineMigrationStatus {
    /// The generation of the spec that this status was computed from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The stage, for display. Programs read the conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<MigrationPhase>,
    /// The node that the guest leaves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The node that it goes to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The reservation pod on the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reservation: Option<String>,
    /// The epoch on the volume that the move started in, as text. A later epoch tells that it was
    /// committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_epoch: Option<String>,
    /// When the attempt was begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When a target was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placed_at: Option<Time>,
    /// When the attempt ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
    /// Progress of the copy, as the source reports it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<MigrationProgress>,
    /// Complete: True with Succeeded, False with why it failed, Unknown while it is under way.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Progress of the copy, as the source reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MigrationProgress {
    /// How much of the guest's memory is on the target, for example 42%.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<String>,
    /// Completed pre-copy iterations over the guest's memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rounds: Option<i32>,
    /// Bytes sent or saved so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transferred: Option<Quantity>,
    /// Bytes still to be sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remaining: Option<Quantity>,
    /// The downtime if the guest were stopped now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_downtime: Option<Duration>,
    /// The downtime: how long the guest's virtual CPUs were stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured_downtime: Option<Duration>,
    /// How long the whole copy took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<Duration>,
}
