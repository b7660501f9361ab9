//! The operator: observes the cluster, plans with bascule-operator-core, executes.
//!
//! `stores` and `nodes` observe (the API's watches, the daemons' reports), `rows` asks the volumes;
//! `observe` and `intent` make of all that what the core understands; `execute` does what the core
//! says; `vms` and `volumes` go round, `prune` deletes old records, `kvm` speaks up about nodes that
//! cannot run guests. `join` lets nodes in. Only the leader plans; every replica
//! serves Join. The operator keeps nothing that it could not learn again.
#![forbid(unsafe_code)]

mod authority;
mod cli;
mod execute;
mod http;
mod identity;
mod intent;
mod join;
mod kvm;
mod lease;
mod logging;
mod metrics;
mod nodes;
mod observe;
mod pod;
mod prune;
mod records;
mod report;
mod rows;
mod run;
mod stores;
mod vms;
mod volumes;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let args = cli::Args::parse();
    match run::main(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
