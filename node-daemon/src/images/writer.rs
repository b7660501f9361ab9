//! The writer: from the fetcher's pipe (or a file) to the disk's extents.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bascule_image::Inspection;
use bascule_ipc::Connection;
use bascule_ipc::volume::{Request, Response};
use bascule_node_api::report::{ImportReport, ImportState};
use bascule_types::{Bytes, Change, DiskRow, RedactedUrl};
use bascule_volume_gate::{GateReader, Pace, WriterPage};

use super::blocks::{CHUNK_BYTES, Target, chunk_buffer};
use super::fetch::FetchJob;
use super::fetcher::Fetcher;
use super::final_failure::is_final;
use super::image_hash::ImageHash;
use super::job::{ImportJob, JobSource, write_report};
use super::length_limit::{LengthLimit, image_role};

/// `bascule-import run`
#[derive(Debug, clap::Args)]
pub(crate) struct RunArgs {
    /// The job, as bascule-node wrote it
    #[arg(long)]
    job: PathBuf,
}

/// Does one import. A failure is also in the report.
pub(crate) fn run(args: &RunArgs) -> Result<()> {
    let bytes = fs::read(&args.job).with_context(|| format!("read {}", args.job.display()))?;
    let job: ImportJob = serde_json::from_slice(&bytes).context("read the job")?;
    let outcome = import(&job);
    if let Err(error) = &outcome {
        let state = ImportState::Failed {
            message: format!("{error:#}"),
            is_final: is_final(error),
        };
        report(&job, Bytes(0), None, state)?;
    }
    outcome
}

fn import(job: &ImportJob) -> Result<()> {
    let mut volume = Connection::connect(&job.socket, HELLO_LIMIT).context("reach the volume")?;
    volume
        .set_timeout(Some(VOLUME_LIMIT))
        .context("reach the volume")?;
    let (mut target, row) = open(job, &mut volume)?;
    let length = if row.importing {
        fill(job, &mut target, &row)?
    } else {
        row.size
    };
    finish(job, &mut volume, length)?;
    report(job, length, Some(length), ImportState::Complete { length })
}

fn open(job: &ImportJob, volume: &mut Connection) -> Result<(Target, DiskRow)> {
    let request = Request::OpenVm {
        vm: job.vm,
        owner: job.owner,
        epoch: job.epoch,
        pid: std::process::id(),
    };
    let (response, fds) = volume
        .call::<_, Response>(&request)
        .context("open the VM's disks")?;
    let opened = match response {
        Response::Opened(opened) => opened,
        Response::Refused(refusal) => bail!("the volume refused: {refusal}"),
        other => bail!("the volume answered {other:?}"),
    };
    let mut fds = fds.into_iter();
    let (Some(device), Some(gate)) = (fds.next(), fds.next()) else {
        bail!("the volume did not hand out its device and gate");
    };
    let page = fds.next().map(WriterPage::attach).transpose();
    let row = opened
        .disks
        .into_iter()
        .find(|row| row.disk == job.disk)
        .context("the volume has no such disk")?;
    let target = Target {
        device: File::from(device),
        gate: GateReader::from_fd(gate).context("map the gate page")?,
        page: page.context("map the writer page")?,
        owner: job.owner,
        runs: row.extents.clone(),
        pace: Pace::default(),
    };
    Ok((target, row))
}

/// Fills the disk; says how long the image was.
fn fill(job: &ImportJob, target: &mut Target, row: &DiskRow) -> Result<Bytes> {
    let limit = LengthLimit {
        role: row.role,
        disk: row.size.max(Bytes(target.capacity())),
    };
    let (mut source, fetcher) = open_source(job, limit)?;
    let mut inspection = Inspection::new(image_role(row.role));
    let mut hash = match &job.source {
        JobSource::Http { digest, .. } => Some(ImageHash::new(digest)),
        JobSource::Blank | JobSource::File { .. } => None,
    };
    let mut buffer = chunk_buffer();
    let mut written = 0u64;
    loop {
        let chunk = buffer.bytes_mut();
        let read = read_full(source.as_mut(), chunk).context("read the image")?;
        if read == 0 {
            break;
        }
        limit.check(written + read as u64)?;
        let image = chunk.get(..read).unwrap_or_default();
        inspection.feed(image)?;
        if let Some(hash) = &mut hash {
            hash.update(image);
        }
        // The tail of the last block reads as zeroes.
        chunk.get_mut(read..).unwrap_or_default().fill(0);
        target.write(written, chunk)?;
        written += read as u64;
        report(job, Bytes(written), None, ImportState::Running)?;
    }
    if let Some(fetcher) = fetcher {
        fetcher.finish()?;
    }
    if let (Some(hash), JobSource::Http { url, .. }) = (hash, &job.source) {
        hash.check(&RedactedUrl(url).to_string())?;
    }
    inspection.finish()?;
    let covered = written.next_multiple_of(CHUNK_BYTES as u64);
    target.zero_from(covered.min(target.capacity()))?;
    target.flush()?;
    Ok(Bytes(written))
}

fn finish(job: &ImportJob, volume: &mut Connection, length: Bytes) -> Result<()> {
    let request = Request::Change(Change::FinishImport {
        disk: job.disk,
        length: Some(length),
    });
    match volume
        .call::<_, Response>(&request)
        .context("finish the import")?
        .0
    {
        Response::Granted(_) => {}
        Response::Refused(refusal) => bail!("the volume refused to finish the import: {refusal}"),
        other => bail!("the volume answered {other:?}"),
    }
    let request = Request::CloseVm {
        vm: job.vm,
        owner: job.owner,
        epoch: job.epoch,
    };
    match volume
        .call::<_, Response>(&request)
        .context("close the VM's disks")?
        .0
    {
        Response::Closed => Ok(()),
        other => bail!("the volume answered {other:?}"),
    }
}

fn open_source(job: &ImportJob, limit: LengthLimit) -> Result<(Box<dyn Read>, Option<Fetcher>)> {
    match &job.source {
        JobSource::Blank => Ok((Box::new(io::empty()), None)),
        JobSource::File { path } => {
            let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
            let length = file.metadata().context("measure the file")?.len();
            limit.check(length)?;
            Ok((Box::new(file), None))
        }
        JobSource::Http { url, ca_bundle, .. } => {
            let (image, fetcher) = Fetcher::start(&FetchJob {
                parent: std::process::id(),
                url: url.clone(),
                limit,
                ca_bundle: ca_bundle.clone(),
                site: job.site.clone(),
            })?;
            Ok((Box::new(image), Some(fetcher)))
        }
    }
}

/// Reads until the buffer is full or the source ends.
fn read_full(source: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(room) = buffer.get_mut(filled..).filter(|room| !room.is_empty()) {
        match source.read(room) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn report(job: &ImportJob, written: Bytes, total: Option<Bytes>, state: ImportState) -> Result<()> {
    let report = ImportReport {
        volume: job.volume.clone(),
        disk: job.disk,
        attempt: job.attempt,
        written,
        total,
        state,
    };
    let path: &Path = &job.report;
    write_report(path, &report)
}

const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// The volume may have to find a coordinator first.
const VOLUME_LIMIT: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_comes_in_drops_fills_whole_chunks() {
        struct Drops(u8);
        impl Read for Drops {
            fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
                self.0 = self.0.saturating_sub(1);
                let count = usize::from(self.0 > 0);
                room[..count].fill(self.0);
                Ok(count)
            }
        }
        let mut buffer = [0; 3];
        assert_eq!(read_full(&mut Drops(5), &mut buffer).unwrap(), 3);
        assert_eq!(buffer, [4, 3, 2]);
        assert_eq!(read_full(&mut Drops(2), &mut buffer).unwrap(), 1);
    }
}
