//! The plugin of kubectl, as a user runs it.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bascule_lab::Lab;
use bascule_lab::command::Run;

use super::NAMESPACE;
use crate::{Console, wait_for};

/// A prepared `kubectl-bascule` of a user, for VMs of [`NAMESPACE`].
///
/// # Errors
/// When there is no such program, or no kubeconfig for the user.
pub fn plugin(lab: &Lab, user: &str, args: &[&str]) -> Result<Run> {
    let program = std::env::var_os("BASCULE_PLUGIN_BIN");
    let program = PathBuf::from(program.context("BASCULE_PLUGIN_BIN: make sets it")?);
    ensure!(program.is_file(), "there is no {}", program.display());
    let run = lab.run_as(user, &program)?;
    Ok(run.args(["--namespace", NAMESPACE]).args(args))
}

/// `kubectl-bascule console`, whose terminal is a pair of pipes. Killed when dropped.
#[derive(Debug)]
pub struct PluginConsole {
    child: Child,
    stdin: ChildStdin,
    /// The guest's output.
    pub output: Console,
}

impl PluginConsole {
    /// Opens the console of `vm` as `user`.
    ///
    /// # Errors
    /// When the program does not start.
    pub fn open(lab: &Lab, user: &str, vm: &str) -> Result<Self> {
        let mut command = plugin(lab, user, &["console", vm])?.into_command();
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("start kubectl-bascule")?;
        let stdin = child.stdin.take().context("no standard input")?;
        let stdout = child.stdout.take().context("no standard output")?;
        let output = Console::new();
        output.follow(stdout)?;
        Ok(Self {
            child,
            stdin,
            output,
        })
    }

    /// Types `keys`.
    ///
    /// # Errors
    /// When the program has ended.
    pub fn type_in(&mut self, keys: &str) -> Result<()> {
        self.stdin.write_all(keys.as_bytes()).context("type")
    }

    /// Types the detach key and waits until the program has ended with success.
    ///
    /// # Errors
    /// When it has not in time, or ends otherwise.
    pub fn detach(mut self) -> Result<()> {
        self.type_in("\u{1d}")?;
        let status = wait_for("kubectl-bascule to end", END_LIMIT, || {
            self.child.try_wait().context("wait for kubectl-bascule")
        })?;
        ensure!(status.success(), "kubectl-bascule: {status}");
        Ok(())
    }
}

impl Drop for PluginConsole {
    fn drop(&mut self) {
        // It has ended already where the test has succeeded.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

const END_LIMIT: Duration = Duration::from_secs(30);
