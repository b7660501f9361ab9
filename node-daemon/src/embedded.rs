//! Embedded mode: commands that run a VirtualMachine document on one node and migrate it to another,
//! without Kubernetes. Each command does one step of the operator's work.

mod console;
mod document;
mod first_run;
mod host_shutdown;
mod interrupt;
mod local_node;
mod migrate;
mod peer;
mod remove;
mod restart;
mod run;
mod schema;
mod stop;
mod volume;

pub(crate) use host_shutdown::{HostShutdownArgs, host_shutdown};
pub(crate) use migrate::{MigrateArgs, migrate};
pub(crate) use restart::{RestartVmArgs, restart_vm};
pub(crate) use run::{RunVmArgs, run_vm};
pub(crate) use stop::{StopVmArgs, stop_vm};
pub(crate) use volume::{VolumeCommand, run as run_volume};
