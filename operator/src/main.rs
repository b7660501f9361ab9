//! The operator: observes the cluster, plans with bascule-operator-core, executes.
//!
//! - Observation: [`stores`] (watches on the Kubernetes API), [`node_clients`] (a report stream from
//!   every node daemon) and [`ownership_cache`] (who owns which VM, polled from the volumes). [`observe`]
//!   and [`vm_intent`] convert them into the types of the core.
//! - Execution: [`execute`] carries a plan out, one API call or node command per action;
//!   [`record_status`] and [`vm_status`] write statuses.
//! - [`subresources`]: the API behind the API server by which users reach consoles and logs.
//! - [`controllers`]: the loops of the leader. [`context`] is what they share.
//! - [`enrollment`] signs node certificates with the key of [`cluster_ca`]. Every replica serves it and the
//!   subresources; all else is done by the leader only. [`startup`] starts both.
//! - [`kube_api`], [`clock`], [`listen`], [`tls`]: helpers that depend on no other module.
//!
//! The operator stores nothing of its own: after a restart it derives everything from the API, the
//! node daemons and the volumes.
#![forbid(unsafe_code)]

mod cli;
mod clock;
mod cluster_ca;
mod context;
mod controllers;
mod copied_metadata;
mod enrollment;
mod execute;
mod guest_report;
mod http;
mod identity;
mod kube_api;
mod leader_election;
mod listen;
mod logging;
mod mac_index;
mod metrics;
mod node_clients;
mod observe;
mod ownership_cache;
mod record_status;
mod reservation_pod;
mod reservation_records;
mod startup;
mod stores;
mod subresources;
mod tls;
mod vm_intent;
mod vm_status;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let args = cli::Args::parse();
    match startup::main(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
