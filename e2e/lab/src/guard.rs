//! The guard: a process that outlives the one that brings a lab up and takes the lab down after it.
//!
//! When the guarded process ends, by Ctrl-C or SIGKILL for that matter, the lab is taken down if it was meant to
//! end with that process, or had not come up yet.

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::down::down;
use crate::names::LabName;
use crate::state::{LabPaths, State};

/// What `lab guard` does.
pub fn guard(name: &LabName, process: i32) -> Result<()> {
    // A terminal's Ctrl-C is for the guarded process alone.
    rustix::process::setsid().context("start a session")?;
    let pid = Pid::from_raw(process).context("process id")?;
    // If the process has already ended, there is nothing to wait for.
    if let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) {
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        while fds[0].revents().is_empty() {
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("wait for the guarded process"),
            }
        }
    }
    match State::load(&LabPaths::new(name)?)? {
        Some(state) if state.ephemeral || !state.complete => down(name),
        _ => Ok(()),
    }
}
