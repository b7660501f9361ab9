//! The fetcher as its parent sees it: an unprivileged process that writes the image to a pipe.

use std::io::{self, Read, Write};
use std::process::{ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};

use super::fetch::FetchJob;
use super::worker::Worker;

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

/// Starts the fetcher. The job goes through standard input, because it may hold passwords, and arguments are
/// visible to every user.
pub(super) fn start_fetcher(job: &FetchJob) -> Result<(Image, Worker)> {
    let json = serde_json::to_vec(job).context("write the fetcher's job")?;
    start(&mut Worker::command("fetch"), &json, IDLE_LIMIT)
}

fn start(command: &mut Command, job: &[u8], idle_limit: Duration) -> Result<(Image, Worker)> {
    let mut fetcher = Worker::start(command.stdin(Stdio::piped()), "fetched")?;
    let mut input = fetcher.take_input()?;
    // A fetcher that has ended already says why in its own way.
    match input.write_all(job) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            return Err(error).context("give the fetcher its job");
        }
        _ => drop(input),
    }
    let pipe = fetcher.take_output()?;
    Ok((Image { pipe, idle_limit }, fetcher))
}

/// Longer than the fetcher's own limits together: for a connection that has become silent, for the next one and for
/// the response on it.
const IDLE_LIMIT: Duration = Duration::from_secs(180);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_stops_sending_is_given_up_and_its_fetcher_killed() {
        let mut command = Command::new("sh");
        let command = command.args(["-c", "echo image; exec sleep 1000"]);
        let (mut image, fetcher) = start(command, b"", Duration::from_millis(100)).unwrap();
        let mut begun = [0; 6];
        while image.read_exact(&mut begun).is_err() {}
        assert_eq!(&begun, b"image\n");
        let error = image.read(&mut begun).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        let pid = fetcher.id();
        drop(fetcher);
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }
}
