//! Without Kubernetes: the same VirtualMachine document, run by hand on one node and moved by hand
//! to another. What the operator does on a cluster, these commands do step by step.

mod console;
mod migrate;
mod peer;
mod run;
mod schema;
mod spec;
mod volume;

pub(crate) use migrate::{MigrateArgs, migrate};
pub(crate) use run::{RunVmArgs, StopVmArgs, run_vm, stop_vm};
pub(crate) use volume::{VolumeCommand, run as run_volume};
