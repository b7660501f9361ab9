//! The phase of a virtual machine and of a migration, as `kubectl get` prints it.
//!
//! These enums need no Kubernetes library, so `bascule-operator-core` uses them too.

#[cfg(feature = "kinds")]
use schemars::JsonSchema;
#[cfg(feature = "kinds")]
use serde::{Deserialize, Serialize};

/// How far a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "kinds", derive(Serialize, Deserialize, JsonSchema))]
pub enum MigrationPhase {
    /// It waits for its turn.
    Pending,
    /// The scheduler looks for a target.
    Placing,
    /// Memory is being copied.
    Copying,
    /// Ownership is being handed over.
    Committing,
    /// The guest runs on the target.
    Succeeded,
    /// It failed; the guest is where it was.
    Failed,
    /// It was cancelled; the guest is where it was.
    Cancelled,
}

impl MigrationPhase {
    /// Whether the attempt has come to its end.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// The name as the status shows it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Placing => "Placing",
            Self::Copying => "Copying",
            Self::Committing => "Committing",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
            Self::Cancelled => "Cancelled",
        }
    }
}

/// What a virtual machine is doing, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "kinds", derive(Serialize, Deserialize, JsonSchema))]
pub enum Phase {
    /// It waits for something that the Ready condition names.
    Pending,
    /// Images are being copied to the volume.
    Importing,
    /// It is about to start.
    Starting,
    /// It runs.
    Running,
    /// It runs, and is on its way to another node.
    Migrating,
    /// Its node does not respond; it is about to be started on another node.
    FailingOver,
    /// It was asked to shut down.
    Stopping,
    /// It is stopped.
    Stopped,
    /// It ended or could not be started, and waits or has given up.
    Failed,
    /// It is being deleted.
    Deleting,
    /// Its state cannot be determined. The guest may well be running.
    Unknown,
}

impl Phase {
    /// All phases, for metrics that report every one of them.
    pub const ALL: [Self; 11] = [
        Self::Pending,
        Self::Importing,
        Self::Starting,
        Self::Running,
        Self::Migrating,
        Self::FailingOver,
        Self::Stopping,
        Self::Stopped,
        Self::Failed,
        Self::Deleting,
        Self::Unknown,
    ];

    /// The name as the status shows it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Importing => "Importing",
            Self::Starting => "Starting",
            Self::Running => "Running",
            Self::Migrating => "Migrating",
            Self::FailingOver => "FailingOver",
            Self::Stopping => "Stopping",
            Self::Stopped => "Stopped",
            Self::Failed => "Failed",
            Self::Deleting => "Deleting",
            Self::Unknown => "Unknown",
        }
    }
}
