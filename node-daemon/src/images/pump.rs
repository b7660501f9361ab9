//! The download on its way to the process that decompresses it.

use std::io::{self, Write};
use std::process::ChildStdin;
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};

use super::download::Download;

/// A thread that writes the download to a process.
pub(super) struct Pump(JoinHandle<Result<Download>>);

impl Pump {
    pub(super) fn start(mut download: Download, mut input: ChildStdin) -> Result<Self> {
        let run = move || {
            let mut buffer = vec![0; BUFFER_BYTES];
            loop {
                let count = download.read(&mut buffer)?;
                if count == 0 {
                    return Ok(download);
                }
                match input.write_all(buffer.get(..count).unwrap_or_default()) {
                    // A process that has ended says why in its own way.
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(download),
                    done => done.context("write to a process")?,
                }
            }
        };
        let thread = std::thread::Builder::new().name("pump".to_owned());
        Ok(Self(thread.spawn(run).context("start a thread")?))
    }

    /// Waits until the download has ended, or the process.
    pub(super) fn finish(self) -> Result<Download> {
        self.0
            .join()
            .map_err(|_| anyhow!("a thread has panicked"))?
    }
}

/// A pipe holds as much (pipe(7)).
const BUFFER_BYTES: usize = 64 << 10;
