//! `bascule-vm`: runs one virtual machine from its configuration file.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Runs one virtual machine.
///
/// Started by bascule-node, in a session and a cgroup of its own. It is controlled through the
/// socket vm.sock beside the configuration file, and writes vm.log, console.log and, when the
/// guest has stopped, state.json there.
#[derive(Debug, Parser)]
#[command(name = "bascule-vm", version)]
struct Arguments {
    /// The configuration: a VmConfig document in JSON.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

fn main() -> ExitCode {
    bascule_vmm::process::run(&Arguments::parse().config)
}
