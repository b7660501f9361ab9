//! `bascule-hold`: the one process of a reservation pod.
//!
//! The pod holds a VM's CPU and memory in the scheduler. Its deletion requests the evacuation of the
//! VM, so this process ignores SIGTERM and runs until `bascule-node` sends SIGUSR1, after the VM has
//! left; a drain that waits for the pod then continues.

#![warn(clippy::print_stdout, clippy::print_stderr)]

use std::io::{self, Write};
use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let (Ok(mut ended), Ok(mut ignored)) = (
        signal(SignalKind::user_defined1()),
        signal(SignalKind::terminate()),
    ) else {
        say(io::stderr(), "bascule-hold: cannot handle signals");
        return ExitCode::FAILURE;
    };
    loop {
        tokio::select! {
            _ = ended.recv() => return ExitCode::SUCCESS,
            _ = ignored.recv() => {
                say(io::stdout(), "SIGTERM: the VM is still here; waiting until it has left");
            }
        }
    }
}

/// Without a reader of its log the process holds the reservation all the same.
fn say(mut log: impl Write, what: &str) {
    drop(writeln!(log, "{what}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `println!` would end the process, and the reservation of a guest that runs with it.
    #[test]
    fn a_log_without_a_reader_ends_no_reservation() {
        let (reader, log) = io::pipe().unwrap();
        drop(reader);
        say(log, "SIGTERM");
    }
}
