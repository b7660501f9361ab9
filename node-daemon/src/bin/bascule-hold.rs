//! `bascule-hold`: the one process of a reservation pod.
//!
//! It holds a VM's place in the scheduler's books. Ending its pod is the signal to evacuate the VM,
//! so it ignores SIGTERM and stays until `bascule-node` sends SIGUSR1: then the VM has left, and a
//! drain that waits for the pod goes on.

use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let (Ok(mut ended), Ok(mut ignored)) = (
        signal(SignalKind::user_defined1()),
        signal(SignalKind::terminate()),
    ) else {
        eprintln!("bascule-hold: cannot handle signals");
        return ExitCode::FAILURE;
    };
    loop {
        tokio::select! {
            _ = ended.recv() => return ExitCode::SUCCESS,
            _ = ignored.recv() => println!("SIGTERM: the VM is still here; waiting until it has left"),
        }
    }
}
