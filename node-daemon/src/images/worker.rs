//! A process that works for an import on hostile bytes: this same program as user nobody, with an empty
//! environment and nothing open but its pipes. Killed when dropped.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail};

use super::final_failure::{FINAL_STATUS, FinalFailure};

/// The process.
pub(super) struct Worker {
    process: Child,
    /// What it does with the image, as in "the image could not be fetched".
    task: &'static str,
    /// Reads its standard error all the time: a full pipe would block the process, and the image.
    errors: Option<JoinHandle<Vec<u8>>>,
}

impl Worker {
    /// The command line: `bascule-import VERB`.
    pub(super) fn command(verb: &str) -> Command {
        let mut command = Command::new(THIS_PROGRAM);
        command.arg0("bascule-import").arg(verb);
        command.env_clear().current_dir("/");
        if rustix::process::geteuid().is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    }

    /// Starts it. Standard input is piped unless the command says otherwise.
    pub(super) fn start(command: &mut Command, task: &'static str) -> Result<Self> {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().context("start a process")?;
        let errors = process.stderr.take().context("a process's errors")?;
        let reader = std::thread::Builder::new()
            .name("errors".to_owned())
            .spawn(move || read_errors(errors))
            .context("start a thread")?;
        Ok(Self {
            process,
            task,
            errors: Some(reader),
        })
    }

    pub(super) fn take_input(&mut self) -> Result<ChildStdin> {
        self.process.stdin.take().context("a process's input")
    }

    pub(super) fn take_output(&mut self) -> Result<ChildStdout> {
        self.process.stdout.take().context("a process's output")
    }

    /// Waits for its end, after all of its output has arrived. The last line of its standard error is the
    /// reason of a failure.
    pub(super) fn finish(mut self) -> Result<()> {
        let status = self.process.wait().context("wait for a process")?;
        if status.success() {
            return Ok(());
        }
        let errors = self.errors.take().map(JoinHandle::join);
        let errors = errors.and_then(Result::ok).unwrap_or_default();
        let errors = String::from_utf8_lossy(&errors);
        let task = self.task;
        match errors.lines().rfind(|line| !line.trim().is_empty()) {
            Some(why) => {
                let why = why.trim_start_matches("error: ").trim();
                if status.code() == Some(FINAL_STATUS.into()) {
                    return Err(FinalFailure(why.to_owned()).into());
                }
                bail!("the image could not be {task}: {why}")
            }
            None => bail!("the image could not be {task}: the process ended with {status}"),
        }
    }

    #[cfg(test)]
    pub(super) fn id(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have ended long ago.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// Reads standard error to its end, and keeps the beginning.
fn read_errors(mut errors: ChildStderr) -> Vec<u8> {
    let mut beginning = Vec::new();
    let read = (&mut errors)
        .take(ERRORS_MAX)
        .read_to_end(&mut beginning)
        .and_then(|_| io::copy(&mut errors, &mut io::sink()));
    if let Err(error) = read {
        tracing::warn!(%error, "cannot read a process's standard error");
    }
    beginning
}

/// The program that is running, wherever it lies: user nobody may not be able to reach its path (proc_pid_exe(5)).
const THIS_PROGRAM: &str = "/proc/self/exe";
/// The user and group `nobody` of every distribution's default.
const NOBODY: u32 = 65534;
/// In bytes: a line or two are expected.
const ERRORS_MAX: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::is_final;

    fn run(script: &str) -> (Vec<u8>, Result<()>) {
        let mut command = Command::new("sh");
        let mut worker = Worker::start(command.args(["-c", script]), "fetched").unwrap();
        let mut bytes = Vec::new();
        let mut output = worker.take_output().unwrap();
        output.read_to_end(&mut bytes).unwrap();
        (bytes, worker.finish())
    }

    #[test]
    fn a_failed_fetch_says_why() {
        let (_, end) = run("echo 'error: fetch http://images/k: http status: 404' >&2; exit 1");
        assert_eq!(
            end.unwrap_err().to_string(),
            "the image could not be fetched: fetch http://images/k: http status: 404"
        );
        let error = run("exit 3").1.unwrap_err().to_string();
        assert!(error.contains("exit status: 3"), "{error}");
        run("echo 'warning: slow' >&2").1.unwrap();
    }

    #[test]
    fn what_a_process_refuses_for_good_is_not_tried_again() {
        let (_, end) = run("echo 'error: the image has 9 bytes, and the disk 8' >&2; exit 3");
        let error = end.unwrap_err();
        assert!(is_final(&error));
        assert_eq!(error.to_string(), "the image has 9 bytes, and the disk 8");
        let (_, end) = run("echo 'error: http status: 404' >&2; exit 1");
        assert!(!is_final(&end.unwrap_err()));
    }

    /// Regression: standard error was read only after the fetcher's end, and a pipe holds 64 KiB (pipe(7)).
    #[test]
    fn a_process_with_much_error_output_does_not_block_the_image() {
        let (image, end) = run("yes warning | head -c 300000 >&2; echo image");
        assert_eq!(image, b"image\n");
        end.unwrap();
    }
}
