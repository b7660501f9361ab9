//! `bascule-node` and `bascule-import`: the programs of a node that start, find again and feed its
//! virtual machines.
//!
//! | folder | what it is | uses |
//! |---|---|---|
//! | `cli.rs` | the command lines | all below |
//! | `daemon/` | `serve`: gRPC for the operator, commands in, reports out | `processes`, `identity` |
//! | `embedded/` | `run`, `stop`, `migrate`, `volume`: commands for use without Kubernetes | `processes`, `identity` |
//! | `processes/` | starts, finds again and calls VM, volume, watchdog and import processes | `images`, `identity` |
//! | `identity/` | the node's UID and certificate; `cert init` and `cert issue` | |
//! | `images/` | `bascule-import`: fills one disk from an image | |
//! | `config.rs`, `paths.rs`, `files.rs`, `output.rs`, `wait.rs` | common options, file layout, atomic writes, output, polling | |
//!
//! The daemon does not decide which node may run a VM: the ownership records on the volume do. It
//! holds no state that a restart could lose.

#![forbid(unsafe_code)]
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod cli;
mod config;
mod daemon;
mod embedded;
mod files;
mod identity;
mod images;
mod output;
mod paths;
mod processes;
mod wait;

pub use cli::{import_main, node_main};
