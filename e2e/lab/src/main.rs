//! `lab`: real Kubernetes clusters on one machine, with fault injection.

use std::process::ExitCode;

fn main() -> ExitCode {
    bascule_lab::cli::run()
}
