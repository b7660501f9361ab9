//! `bascule-hold`: the one process of a reservation pod.
//!
//! The pod holds a VM's CPU and memory in the scheduler. Its deletion requests the evacuation of the
//! VM, so this process ignores SIGTERM and runs until `bascule-node` sends SIGUSR1, after the VM has
//! left; a drain that waits for the pod then continues.

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
