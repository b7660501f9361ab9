//! `kubectl bascule`: what a user does with a virtual machine beyond its objects.
//!
//! It has the user's credentials for the API server and nothing else: every request goes to the API server, which
//! passes those to the operator (the module `subresources` of `bascule-operator`).
//!
//! - [`cli`]: arguments, and the client that they configure.
//! - [`console`]: the serial console, over reconnections; [`position`] decides from where on output is asked for.
//! - [`logs`]: the last serial output.
//! - [`terminal`]: the user's side.
#![forbid(unsafe_code)]

mod cli;
mod console;
mod logs;
mod position;
mod target;
mod terminal;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use crate::cli::{Args, Verb};

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    let outcome = runtime.block_on(async {
        let (client, target) = args.connect().await?;
        match args.verb {
            Verb::Console { .. } => console::run(&client, &target).await,
            Verb::Logs { .. } => logs::run(&client, &target).await,
        }
    });
    // A thread may still wait for standard input.
    runtime.shutdown_background();
    outcome
}
