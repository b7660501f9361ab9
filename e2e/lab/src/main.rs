//! `lab`: real Kubernetes clusters on one machine, with faults to order.

use std::process::ExitCode;

fn main() -> ExitCode {
    bascule_lab::cli::run()
}
