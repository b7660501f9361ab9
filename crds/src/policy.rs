//! The enums of the specs: run policy, behaviour on drain and on node failure, migration mode.
//!
//! These enums need no Kubernetes library, so `bascule-operator-core` uses them too.

#[cfg(feature = "kinds")]
use schemars::JsonSchema;
#[cfg(feature = "kinds")]
use serde::{Deserialize, Serialize};

/// Whether the guest should run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "kinds", derive(Serialize, Deserialize, JsonSchema))]
pub enum RunPolicy {
    /// It should run, always.
    #[default]
    Always,
    /// It should run until it shuts itself down.
    OnFailure,
    /// It should be stopped.
    Stopped,
}

/// What happens on a drain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "kinds", derive(Serialize, Deserialize, JsonSchema))]
pub enum DrainPolicy {
    /// Move it while it runs.
    #[default]
    LiveMigrate,
    /// Pause, save, go on elsewhere.
    QuickMigrate,
    /// Shut down, start elsewhere.
    Shutdown,
}

/// What happens when the node is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "kinds", derive(Serialize, Deserialize, JsonSchema))]
pub enum FailurePolicy {
    /// Start it elsewhere.
    #[default]
    Restart,
    /// Wait for the node.
    Leave,
}

/// What happens when the device fails a read or a write of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "kinds", derive(Serialize, Deserialize, JsonSchema))]
pub enum OnError {
    /// The guest gets the error.
    #[default]
    Report,
    /// The guest is paused and does not get it.
    Pause,
}

/// What happens when the guest's kernel panics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "kinds", derive(Serialize, Deserialize, JsonSchema))]
pub enum OnPanic {
    /// Its machine is reset.
    #[default]
    Restart,
    /// It stays as it is.
    Leave,
}

/// How to move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "kinds", derive(Serialize, Deserialize, JsonSchema))]
pub enum MigrationMode {
    /// While it runs.
    #[default]
    Live,
    /// Paused, through the volume.
    Quick,
}
