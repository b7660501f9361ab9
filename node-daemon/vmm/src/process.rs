//! The process around one machine: configuration, log, control socket, volume, and the owner
//! thread that alone changes what state the machine is in.
//!
//! ```text
//!  vm.sock ──► connection threads ─┐
//!  vCPU and device threads ────────┼─► inbox ──► owner (main thread): Phase
//!  migration thread ───────────────┘
//! ```
//! Read next: [`owner`].

mod config;
mod control;
mod devices;
mod images;
mod migration;
pub(crate) mod owner;
mod report;
mod tenure;
pub(crate) mod volume;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use bascule_ipc::vm::VmConfig;

use self::owner::Owner;
use self::report::RunDir;

/// Runs the machine that `config` describes until it is told to exit. Files that it makes lie
/// beside `config`.
#[must_use]
pub fn run(config: &Path) -> ExitCode {
    match serve(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format_args!("{error:#}"), "cannot run");
            // Before there is a log, the starter's end of the error stream is all there is.
            report::complain(&format!("bascule-vm: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn serve(path: &Path) -> anyhow::Result<()> {
    let run_dir = RunDir::of(path);
    run_dir.start_log().context("start the log")?;
    let config: VmConfig = config::read(path)?;
    run_dir.report_panics(config.uid);
    let span = tracing::info_span!("vm", name = config.name, uid = %config.uid);
    let _entered = span.enter();
    tracing::info!(release = env!("CARGO_PKG_VERSION"), "starting");
    let (mut owner, inbox) = Owner::new(config, run_dir.clone())?;
    control::listen(&run_dir, &owner.handle()).context("listen on vm.sock")?;
    owner.start();
    owner.serve(&inbox);
    tracing::info!("exiting");
    Ok(())
}
