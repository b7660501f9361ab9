//! The fetcher as its parent sees it: an unprivileged process that writes the image to a pipe.

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};

use super::fetch::FetchJob;
use super::final_failure::{FINAL_STATUS, RefusedByFetcher};

/// A fetcher at work; killed when dropped.
pub(super) struct Fetcher {
    process: Child,
    /// Reads the fetcher's standard error all the time: a full pipe would block the fetcher, and the image.
    errors: Option<JoinHandle<Vec<u8>>>,
}

/// The image's bytes as they arrive. Reading fails after `idle_limit` without any: a source that was cut off
/// sends nothing and closes nothing.
pub(super) struct Image {
    pipe: ChildStdout,
    idle_limit: Duration,
}

impl Read for Image {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut pipe = [PollFd::new(&self.pipe, PollFlags::IN)];
        let idle_limit = self.idle_limit.try_into().map_err(io::Error::other)?;
        if poll(&mut pipe, Some(&idle_limit))? == 0 {
            let message = format!("the source sent nothing for {:?}", self.idle_limit);
            return Err(io::Error::new(io::ErrorKind::TimedOut, message));
        }
        self.pipe.read(into)
    }
}

impl Fetcher {
    /// Runs this same program as user nobody, with nothing open but its pipes. The job goes through
    /// standard input, because it may hold passwords, and arguments are visible to every user.
    pub(super) fn start(job: &FetchJob) -> Result<(Image, Self)> {
        let program = std::env::current_exe().context("find this program")?;
        let mut command = Command::new(program);
        command.arg("fetch").env_clear().current_dir("/");
        if rustix::process::geteuid().is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        let json = serde_json::to_vec(job).context("write the fetcher's job")?;
        Self::spawn(&mut command, &json, IDLE_LIMIT)
    }

    fn spawn(command: &mut Command, job: &[u8], idle_limit: Duration) -> Result<(Image, Self)> {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut process = command.spawn().context("start the fetcher")?;
        let mut input = process.stdin.take().context("the fetcher's input")?;
        // A fetcher that has ended already says why in its own way.
        match input.write_all(job) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(error).context("give the fetcher its job");
            }
            _ => drop(input),
        }
        let pipe = process.stdout.take().context("the fetcher's pipe")?;
        let errors = process.stderr.take().context("the fetcher's errors")?;
        let reader = std::thread::Builder::new()
            .name("fetcher".to_owned())
            .spawn(move || read_errors(errors))
            .context("start a thread")?;
        let image = Image { pipe, idle_limit };
        let fetcher = Self {
            process,
            errors: Some(reader),
        };
        Ok((image, fetcher))
    }

    /// Waits for the fetcher's end, after the whole image has arrived. The last line of its standard error is
    /// the reason of a failure.
    pub(super) fn finish(mut self) -> Result<()> {
        let status = self.process.wait().context("wait for the fetcher")?;
        if status.success() {
            return Ok(());
        }
        let errors = self.errors.take().map(JoinHandle::join);
        let errors = errors.and_then(Result::ok).unwrap_or_default();
        let errors = String::from_utf8_lossy(&errors);
        match errors.lines().rfind(|line| !line.trim().is_empty()) {
            Some(why) => {
                let why = why.trim_start_matches("error: ").trim();
                if status.code() == Some(FINAL_STATUS.into()) {
                    return Err(RefusedByFetcher(why.to_owned()).into());
                }
                bail!("the image could not be fetched: {why}")
            }
            None => bail!("the image could not be fetched: its fetcher ended with {status}"),
        }
    }
}

impl Drop for Fetcher {
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
        tracing::warn!(%error, "cannot read the fetcher's standard error");
    }
    beginning
}

/// The user and group `nobody` of every distribution's default.
const NOBODY: u32 = 65534;
/// Longer than the fetcher's own limits for a connection and for a response together.
const IDLE_LIMIT: Duration = Duration::from_secs(120);
/// In bytes: a line or two are expected.
const ERRORS_MAX: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::is_final;

    fn fetch(script: &str) -> (Vec<u8>, Result<()>) {
        let mut command = Command::new("sh");
        let (mut image, fetcher) =
            Fetcher::spawn(command.args(["-c", script]), b"", IDLE_LIMIT).unwrap();
        let mut bytes = Vec::new();
        image.read_to_end(&mut bytes).unwrap();
        (bytes, fetcher.finish())
    }

    #[test]
    fn a_failed_fetch_says_why() {
        let (_, end) = fetch("echo 'error: fetch http://images/k: http status: 404' >&2; exit 1");
        assert_eq!(
            end.unwrap_err().to_string(),
            "the image could not be fetched: fetch http://images/k: http status: 404"
        );
        let error = fetch("exit 3").1.unwrap_err().to_string();
        assert!(error.contains("exit status: 3"), "{error}");
        fetch("echo 'warning: slow' >&2").1.unwrap();
    }

    #[test]
    fn a_source_that_stops_sending_is_given_up_and_its_fetcher_killed() {
        let mut command = Command::new("sh");
        let command = command.args(["-c", "echo image; exec sleep 1000"]);
        let (mut image, fetcher) =
            Fetcher::spawn(command, b"", Duration::from_millis(100)).unwrap();
        let mut begun = [0; 6];
        while image.read_exact(&mut begun).is_err() {}
        assert_eq!(&begun, b"image\n");
        let error = image.read(&mut begun).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        let pid = fetcher.process.id();
        drop(fetcher);
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn what_the_fetcher_refuses_for_good_is_not_fetched_again() {
        let (_, end) = fetch("echo 'error: the image has 9 bytes, and the disk 8' >&2; exit 3");
        let error = end.unwrap_err();
        assert!(is_final(&error));
        assert_eq!(error.to_string(), "the image has 9 bytes, and the disk 8");
        let (_, end) = fetch("echo 'error: http status: 404' >&2; exit 1");
        assert!(!is_final(&end.unwrap_err()));
    }

    /// Regression: standard error was read only after the fetcher's end, and a pipe holds 64 KiB (pipe(7)).
    #[test]
    fn a_fetcher_with_much_error_output_does_not_block_the_image() {
        let script = "yes warning | head -c 300000 >&2; echo image";
        let (image, end) = fetch(script);
        assert_eq!(image, b"image\n");
        end.unwrap();
    }
}
