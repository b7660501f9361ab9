//! `bascule-node` and `bascule-import`: the programs of a node that start, find again and feed its
//! virtual machines.
//!
//! | file | what it is |
//! |---|---|
//! | `daemon.rs`, `join.rs`, `tls.rs`, `server.rs` | the daemon: joins, serves the operator's gRPC |
//! | `execute.rs` | one command in, one outcome out |
//! | `vms.rs`, `volumes.rs`, `imports.rs`, `tap.rs`, `reservation.rs` | what commands do |
//! | `report.rs` | what the operator is told |
//! | `launch.rs` | starting processes that outlive this one |
//! | `import.rs` | `bascule-import` |
//! | `embedded.rs`, `cert.rs` | without Kubernetes |
//!
//! The daemon decides nothing about who may run what: the volume's rows do. It holds no state that a
//! restart could lose.

mod asking;
mod cert;
mod cli;
mod config;
mod daemon;
mod embedded;
mod execute;
mod files;
mod import;
mod imports;
mod join;
mod launch;
mod local;
mod paths;
mod report;
mod reservation;
mod revival;
mod server;
mod supervisor;
mod tap;
mod tls;
mod turns;
mod vms;
mod volumes;

pub use cli::{import_main, node_main};
