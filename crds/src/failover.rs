//! The `Failover` kind.
#![expect(
    unreachable_pub,
    clippy::duplicated_attributes,
    reason = "the KubeSchema derive repeats each struct, with its attributes, inside a function"
)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Owner, ProofKind};

/// The node that was lost. Immutable.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "bascule.dev",
    version = "v1alpha1",
    kind = "Failover",
    plural = "failovers",
    category = "bascule",
    namespaced,
    status = "FailoverStatus",
    derive = "PartialEq",
    doc = "The record of one restart of a virtual machine after the loss of its node: what happened when, and the proof that the lost node would not write any more. A node that comes back before anything was taken from it leaves one that says Withdrawn. Created and updated by the operator only.",
    printcolumn(name = "VM", type_ = "string", json_path = ".spec.virtualMachine"),
    printcolumn(
        name = "From",
        type_ = "string",
        json_path = ".spec.node",
        description = "The node that was lost."
    ),
    printcolumn(
        name = "To",
        type_ = "string",
        json_path = ".status.target",
        description = "The node that it was started on."
    ),
    printcolumn(
        name = "Proof",
        type_ = "string",
        json_path = ".status.proof.kind",
        description = "Why it was certain that the lost node would not write any more."
    ),
    printcolumn(name = "Status", type_ = "string", json_path = ".status.phase"),
    printcolumn(
        name = "Suspected",
        type_ = "date",
        json_path = ".status.suspectedAt",
        priority = 1
    ),
    printcolumn(
        name = "Proved",
        type_ = "date",
        json_path = ".status.provedAt",
        priority = 1
    ),
    printcolumn(
        name = "Started",
        type_ = "date",
        json_path = ".status.startedAt",
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
#[x_kube(validation = Rule::new("self == oldSelf").message("a Failover is a record and cannot be changed"))]
pub struct FailoverSpec {
    /// The name of the VirtualMachine, in the same namespace.
    #[schemars(length(min = 1, max = 63))]
    pub virtual_machine: String,
    /// The UID of that VirtualMachine; a later one of the same name has another.
    #[schemars(length(max = 36))]
    pub uid: String,
    /// The node that stopped responding.
    #[schemars(length(max = 253))]
    pub node: String,
    /// The SharedVolume on which its heartbeat stopped.
    #[schemars(length(max = 253))]
    pub volume: String,
    /// The slot and generation there that owned the virtual machine.
    pub owner: Owner,
    /// The epoch in which they owned it, as text.
    #[schemars(length(max = 20))]
    pub epoch: String,
}

/// The observed progress of the failover.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailoverStatus {
    /// The stage, for display. Programs read the conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<FailoverPhase>,
    /// When the node was first found unresponsive on both the network and the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspected_at: Option<Time>,
    /// When the volume's coordinator had its proof.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proved_at: Option<Time>,
    /// When the ownership was with the new node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_over_at: Option<Time>,
    /// When the guest had been started there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// The node that the guest was started on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The epoch in which it runs there, as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_epoch: Option<String>,
    /// Why it was certain that the lost node would not write any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<FencingProof>,
    /// Complete: True when the guest runs again, False when the node came back first, Unknown while
    /// it is under way, with what it waits for in the message.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// How far a failover is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum FailoverPhase {
    /// The node does not respond; the volume has no fence proof yet.
    Suspected,
    /// Proved and taken over; the guest is being started.
    TakenOver,
    /// The guest runs again.
    Succeeded,
    /// The node came back before anything was taken from it, or the virtual machine was deleted.
    Withdrawn,
}

/// Why it is certain that a node will not write any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FencingProof {
    /// The kind of proof.
    pub kind: ProofKind,
    /// Its figures, in words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

impl FailoverPhase {
    /// Whether the record is closed.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Withdrawn)
    }

    /// The phase as the status field spells it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Suspected => "Suspected",
            Self::TakenOver => "TakenOver",
            Self::Succeeded => "Succeeded",
            Self::Withdrawn => "Withdrawn",
        }
    }
}
