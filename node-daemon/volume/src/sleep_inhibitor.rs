//! Keeps the node awake while a process has the volume open for writing.
//!
//! A sleeping machine renews no lease, its hardware watchdog may be stopped, and a write that was
//! submitted before it slept lands after it wakes: by then another node may own the VM. The lock is that
//! of systemd-logind (`systemd-inhibit`, mode `block`), which every way to sleep through logind honours.
//! Without systemd there is none: on such a node sleep must be disabled by other means, as for writing
//! to `/sys/power/state` directly.

use std::io;
use std::process::{Child, Command, Stdio};

/// Holds the lock by a child process, which ends with this one: it reads a pipe whose other end is here.
#[derive(Debug)]
pub struct SleepInhibitor {
    program: &'static str,
    /// What stands before the arguments of systemd-inhibit.
    first: &'static [&'static str],
    holder: Option<Child>,
    /// The last failure, so that it is logged once.
    failed: bool,
}

impl SleepInhibitor {
    /// The lock of systemd-logind; not held yet.
    #[must_use]
    pub fn new() -> Self {
        Self::with_program(PROGRAM, &[])
    }

    fn with_program(program: &'static str, first: &'static [&'static str]) -> Self {
        Self {
            program,
            first,
            holder: None,
            failed: false,
        }
    }

    /// Takes the lock while `wanted`, and gives it back otherwise. Takes it again if its process has
    /// ended. Idempotent.
    pub fn set(&mut self, wanted: bool) {
        if !wanted {
            self.failed = false;
            if let Some(holder) = self.holder.take() {
                end(holder);
            }
            return;
        }
        if self.is_held() {
            return;
        }
        match self.start() {
            Ok(holder) => {
                self.holder = Some(holder);
            }
            Err(error) if !self.failed => {
                self.failed = true;
                let program = self.program;
                tracing::info!(%error, program, "the node may go to sleep with open writers: disable sleep on it");
            }
            Err(_) => {}
        }
    }

    /// Whether the process that holds the lock runs.
    fn is_held(&mut self) -> bool {
        let ended = match &mut self.holder {
            Some(holder) => !matches!(holder.try_wait(), Ok(None)),
            None => return false,
        };
        if ended {
            self.holder = None;
            if !self.failed {
                self.failed = true;
                tracing::warn!("systemd-inhibit ended: the node may go to sleep with open writers");
            }
        }
        !ended
    }

    fn start(&self) -> io::Result<Child> {
        Command::new(self.program)
            .args(self.first)
            .args(["--what=sleep", "--mode=block", "--who=bascule-volume"])
            .arg("--why=a virtual machine writes to shared storage")
            .arg("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
    }
}

impl Default for SleepInhibitor {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for SleepInhibitor {
    fn drop(&mut self) {
        self.set(false);
    }
}

fn end(mut holder: Child) {
    // Its end of the pipe first; `kill` for a program that does not read it.
    drop(holder.stdin.take());
    if let Err(error) = holder.kill().and_then(|()| holder.wait()) {
        tracing::debug!(%error, "the process that kept the node awake");
    }
}

/// systemd-inhibit(1).
const PROGRAM: &str = "systemd-inhibit";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_is_held_while_wanted_taken_again_when_lost_and_given_back() {
        // No program of the test's own: what was just written cannot be executed while a child of another
        // thread, between its fork and its exec, has it open as well.
        let mut inhibitor = SleepInhibitor::with_program("sh", &["-c", "exec cat"]);
        assert!(!inhibitor.is_held());
        inhibitor.set(true);
        let first = inhibitor.holder.as_ref().unwrap().id();
        inhibitor.set(true);
        assert_eq!(inhibitor.holder.as_ref().unwrap().id(), first);
        let holder = inhibitor.holder.as_mut().unwrap();
        holder.kill().unwrap();
        holder.wait().unwrap();
        inhibitor.set(true);
        assert_ne!(inhibitor.holder.as_ref().unwrap().id(), first);
        inhibitor.set(false);
        assert!(!inhibitor.is_held());
    }

    #[test]
    fn a_node_without_the_program_writes_all_the_same() {
        let mut inhibitor = SleepInhibitor::with_program("/nonexistent/inhibit", &[]);
        inhibitor.set(true);
        assert!(!inhibitor.is_held() && inhibitor.failed);
    }
}
