//! The fetcher as its parent sees it: a process of nobody's, from which the image comes in a pipe.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail};

/// A fetcher at work.
pub(super) struct Fetcher {
    process: Child,
    /// Hears what it says all the time: a full pipe would hold the image up.
    hearing: JoinHandle<Vec<u8>>,
}

impl Fetcher {
    /// It runs this same program, as nobody, with nothing but its pipes.
    pub(super) fn start(url: &str, allow: &[String]) -> Result<(ChildStdout, Self)> {
        let program = std::env::current_exe().context("find this program")?;
        let mut command = Command::new(program);
        command.args(["fetch", "--url", url]);
        for range in allow {
            command.args(["--allow", range]);
        }
        command.env_clear().current_dir("/");
        if rustix::process::geteuid().is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        Self::spawn(&mut command)
    }

    fn spawn(command: &mut Command) -> Result<(ChildStdout, Self)> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut process = command.spawn().context("start the fetcher")?;
        let image = process.stdout.take().context("the fetcher's pipe")?;
        let errors = process.stderr.take().context("the fetcher's errors")?;
        let hearing = std::thread::Builder::new()
            .name("fetcher".to_owned())
            .spawn(move || hear(errors))
            .context("start a thread")?;
        Ok((image, Self { process, hearing }))
    }

    /// Waits for its end, after all of the image has come. Why it failed is the last that it says.
    pub(super) fn finish(mut self) -> Result<()> {
        let status = self.process.wait().context("wait for the fetcher")?;
        if status.success() {
            return Ok(());
        }
        let said = self.hearing.join().unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        match said.lines().rfind(|line| !line.trim().is_empty()) {
            Some(why) => {
                let why = why.trim_start_matches("error: ").trim();
                bail!("the image could not be fetched: {why}")
            }
            None => bail!("the image could not be fetched: its fetcher ended with {status}"),
        }
    }
}

/// All of it, to keep the beginning.
fn hear(mut errors: ChildStderr) -> Vec<u8> {
    let mut said = Vec::new();
    let heard = (&mut errors)
        .take(SAID_MAX)
        .read_to_end(&mut said)
        .and_then(|_| io::copy(&mut errors, &mut io::sink()));
    if let Err(error) = heard {
        tracing::warn!(%error, "cannot hear the fetcher");
    }
    said
}

/// The user and group `nobody` of every distribution's default.
const NOBODY: u32 = 65534;
/// In bytes: a line or two are expected.
const SAID_MAX: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    fn fetch(script: &str) -> (Vec<u8>, Result<()>) {
        let mut command = Command::new("sh");
        let (mut image, fetcher) = Fetcher::spawn(command.args(["-c", script])).unwrap();
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

    /// More than a pipe holds (64 KiB, pipe(7)) before the image: nobody listened until its end.
    #[test]
    fn a_talkative_fetcher_does_not_hold_the_image_up() {
        let script = "yes warning | head -c 300000 >&2; echo image";
        let (image, end) = fetch(script);
        assert_eq!(image, b"image\n");
        end.unwrap();
    }
}
