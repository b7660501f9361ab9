//! Without Kubernetes: the same VirtualMachine document, run by hand on one node and moved by hand
//! to another. What the operator does on a cluster, these commands do step by step.

mod console;
mod document;
mod first_run;
mod interrupt;
mod local_node;
mod migrate;
mod peer;
mod remove;
mod run;
mod schema;
mod stop;
mod volume;

pub(crate) use migrate::{MigrateArgs, migrate};
pub(crate) use run::{RunVmArgs, run_vm};
pub(crate) use stop::{StopVmArgs, stop_vm};
pub(crate) use volume::{VolumeCommand, run as run_volume};
