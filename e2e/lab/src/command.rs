//! Running a program to completion with a deadline; an error contains the program's output.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};

/// Exit status and output of a program that has ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit status, or the signal that ended it.
    pub status: ExitStatus,
    /// Standard output; invalid UTF-8 is replaced.
    pub stdout: String,
    /// Standard error; invalid UTF-8 is replaced.
    pub stderr: String,
}

/// Builder of a program run: program, arguments, environment, input, deadline.
#[derive(Debug)]
pub struct Run {
    command: Command,
    stdin: Option<Vec<u8>>,
    deadline: Duration,
}

impl Run {
    /// `program`, looked up in `PATH`, without arguments yet.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            command: Command::new(program),
            stdin: None,
            deadline: DEADLINE_DEFAULT,
        }
    }

    /// `program` in the network namespace `netns`. The mount namespace stays: `ip netns exec` would hide the
    /// cgroup hierarchies.
    pub fn in_netns(netns: &str, program: impl AsRef<OsStr>) -> Self {
        Self::new("nsenter")
            .arg(format!("--net=/run/netns/{netns}"))
            .arg("--")
            .arg(program)
    }

    /// Appends an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Appends arguments.
    pub fn args<I: IntoIterator<Item: AsRef<OsStr>>>(mut self, args: I) -> Self {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Sets the working directory.
    pub fn dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Bytes for standard input. Default: /dev/null.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// After this time the program is killed and the run fails. Default: 2 min.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Runs the program. A non-zero exit status is not an error here.
    pub fn output(mut self) -> Result<Output> {
        let shown = self.shown();
        self.command
            .stdin(if self.stdin.is_some() {
                Stdio::piped()
            } else {
                Stdio::null()
            })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self
            .command
            .spawn()
            .with_context(|| format!("start {shown}"))?;
        let pid = child.id();
        if let (Some(bytes), Some(mut pipe)) = (self.stdin.take(), child.stdin.take()) {
            // A write error means that the program did not read its input; its exit status tells.
            named_thread("stdin", move || drop(pipe.write_all(&bytes)))?;
        }
        let stdout = child.stdout.take().map(drain).transpose()?;
        let stderr = child.stderr.take().map(drain).transpose()?;
        let (ended_tx, ended_rx) = mpsc::channel();
        named_thread("wait", move || drop(ended_tx.send(child.wait())))?;
        let status = match ended_rx.recv_timeout(self.deadline) {
            Ok(status) => status.with_context(|| format!("wait for {shown}"))?,
            Err(_) => {
                kill_pid(pid)?;
                bail!("{shown}: killed after {} s", self.deadline.as_secs());
            }
        };
        let text = |rx: Option<mpsc::Receiver<Vec<u8>>>| {
            // A grandchild may keep the pipe open: after PIPE_GRACE the output is taken as empty.
            let bytes = rx
                .and_then(|rx| rx.recv_timeout(PIPE_GRACE).ok())
                .unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Ok(Output {
            status,
            stdout: text(stdout),
            stderr: text(stderr),
        })
    }

    /// Runs it and returns its standard output; a failure carries the command and what it wrote.
    pub fn text(self) -> Result<String> {
        let shown = self.shown();
        let output = self.output()?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let words = [output.stderr.trim(), output.stdout.trim()].join("\n");
        Err(anyhow!("{shown}: {}: {}", output.status, words.trim()))
    }

    /// [`Self::text`] without the output.
    pub fn done(self) -> Result<()> {
        self.text().map(drop)
    }

    /// The program, to be started with other pipes than here; without the input and the deadline.
    pub fn into_command(self) -> Command {
        self.command
    }

    /// Replaces this process with the program (`execve`). Returns only on failure.
    pub fn replace_self(mut self) -> anyhow::Error {
        use std::os::unix::process::CommandExt;

        let shown = self.shown();
        anyhow::Error::new(self.command.exec()).context(format!("become {shown}"))
    }

    fn shown(&self) -> String {
        let words = std::iter::once(self.command.get_program()).chain(self.command.get_args());
        words
            .map(OsStr::to_string_lossy)
            .collect::<Vec<_>>()
            .join(" ")
    }
}

/// Starts a thread with a name.
pub(crate) fn named_thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .with_context(|| format!("start the {name} thread"))
        .map(drop)
}

fn drain(mut pipe: impl Read + Send + 'static) -> Result<mpsc::Receiver<Vec<u8>>> {
    let (bytes_tx, bytes_rx) = mpsc::channel();
    named_thread("drain", move || {
        let mut bytes = Vec::new();
        // A read error keeps the bytes that were read before it.
        drop(pipe.read_to_end(&mut bytes));
        drop(bytes_tx.send(bytes));
    })?;
    Ok(bytes_rx)
}

fn kill_pid(pid: u32) -> Result<()> {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .context("process id out of range")?;
    match kill_process(pid, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error).context("kill a program that took too long"),
    }
}

/// A guess for short helper programs; builds and downloads set their own deadline.
const DEADLINE_DEFAULT: Duration = Duration::from_secs(120);
/// How long to wait for output after the program itself has ended.
const PIPE_GRACE: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn output_and_input_pass_through() {
        let text = Run::new("tr")
            .args(["a-z", "A-Z"])
            .stdin("lab")
            .text()
            .unwrap();
        assert_eq!(text, "LAB");
    }

    #[test]
    fn a_failure_shows_the_command_and_its_output() {
        let error = Run::new("sh")
            .args(["-c", "echo no disk >&2; exit 3"])
            .done()
            .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("sh -c") && text.contains("no disk") && text.contains('3'),
            "{text}"
        );
    }

    #[test]
    fn a_program_that_takes_too_long_is_killed() {
        let started = Instant::now();
        let error = Run::new("sleep")
            .arg("60")
            .deadline(Duration::from_millis(50))
            .done();
        assert!(error.unwrap_err().to_string().contains("killed"));
        assert!(started.elapsed() < Duration::from_secs(10));
    }
}
