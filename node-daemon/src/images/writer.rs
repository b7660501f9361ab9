//! The writer: from the fetcher's pipe (or a file) to the disk's extents. Read next: `unpacking.rs`.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bascule_ipc::Connection;
use bascule_ipc::volume::{Request, Response};
use bascule_node_api::report::ImportState;
use bascule_types::{Bytes, Change, DiskRole, DiskRow, HttpAuthorization, SourceAuthorization};
use bascule_volume_gate::{GateReader, Pace, WriterPage};

use super::blocks::{Target, is_thick};
use super::download::Download;
use super::filler::Filler;
use super::final_failure::is_final;
use super::job::{ImportJob, JobSource, Progress, report};
use super::length_limit::LengthLimit;
use super::unpacking::{fill_as_it_is, fill_unpacked};

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
    let outcome = authorization(&job.source, io::stdin().lock())
        .and_then(|authorization| import(&job, authorization));
    if let Err(error) = &outcome {
        let state = ImportState::Failed {
            message: format!("{error:#}"),
            is_final: is_final(error),
        };
        report(&job, Progress::default(), state)?;
    }
    outcome
}

/// The header for a source that wants one, from standard input: unlike the job's file, it is nowhere once it was read.
fn authorization(source: &JobSource, input: impl Read) -> Result<Option<SourceAuthorization>> {
    let JobSource::Http {
        authorization_from: Some(secret),
        ..
    } = source
    else {
        return Ok(None);
    };
    let mut value = Vec::new();
    let limit = HttpAuthorization::BYTES_MAX as u64 + 1;
    let read = input.take(limit).read_to_end(&mut value);
    read.context("read the Authorization header")?;
    let value = HttpAuthorization::parse(&value).with_context(|| secret.to_string())?;
    Ok(Some(SourceAuthorization {
        secret: secret.clone(),
        value,
    }))
}

fn import(job: &ImportJob, authorization: Option<SourceAuthorization>) -> Result<()> {
    let mut volume = Connection::connect(&job.socket, HELLO_LIMIT).context("reach the volume")?;
    volume
        .set_timeout(Some(VOLUME_LIMIT))
        .context("reach the volume")?;
    let (mut target, row) = open(job, &mut volume)?;
    let length = if row.importing {
        fill(job, authorization, &mut target, &row)?
    } else {
        row.size
    };
    finish(job, &mut volume, length)?;
    let progress = Progress {
        downloaded: length,
        written: length,
    };
    report(job, progress, ImportState::Complete { length })
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
    let device = File::from(device);
    let target = Target {
        is_thick: is_thick(&device).context("measure the device")?,
        device,
        gate: GateReader::from_fd(gate).context("map the gate page")?,
        page: page.context("map the writer page")?,
        owner: job.owner,
        runs: row.extents.clone(),
        pace: Pace::default(),
        zero_pace: Pace::default(),
    };
    Ok((target, row))
}

/// Fills the disk; says how long the image was.
fn fill(
    job: &ImportJob,
    authorization: Option<SourceAuthorization>,
    target: &mut Target,
    row: &DiskRow,
) -> Result<Bytes> {
    let limit = LengthLimit {
        role: row.role,
        disk: row.size.max(Bytes(target.capacity())),
    };
    let (download, origin) = Download::open(job, limit, authorization)?;
    let filler = Filler::new(job, target, limit, download.count());
    match row.role {
        DiskRole::Data => fill_unpacked(job, (download, origin), filler, limit),
        DiskRole::Kernel | DiskRole::Initrd => fill_as_it_is(download, origin, filler),
    }
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

const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// The volume may have to find a coordinator first.
const VOLUME_LIMIT: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use bascule_types::{ImageDigest, SecretKey};

    use super::*;

    fn source(authorization_from: Option<SecretKey>) -> JobSource {
        JobSource::Http {
            url: "https://images.example/a".to_owned(),
            digest: ImageDigest::Sha256("0".repeat(64)),
            ca_bundle: None,
            authorization_from,
        }
    }

    #[test]
    fn the_header_comes_on_standard_input_for_a_source_that_wants_one() {
        let secret = SecretKey {
            name: "images".to_owned(),
            key: "authorization".to_owned(),
        };
        let wants = source(Some(secret.clone()));
        let read = authorization(&wants, &b"Bearer hunter2"[..]).unwrap();
        let read = read.unwrap();
        assert_eq!(
            (read.value.reveal(), &read.secret),
            ("Bearer hunter2", &secret)
        );
        let long = vec![b'x'; HttpAuthorization::BYTES_MAX + 1];
        for bad in [&b""[..], b"hunter2\r\nHost: other", &long] {
            let error = format!("{:#}", authorization(&wants, bad).unwrap_err());
            assert!(error.contains("Secret \"images\""), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn nothing_is_read_for_a_source_that_wants_no_header() {
        struct Unreadable;
        impl Read for Unreadable {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                panic!("standard input was read");
            }
        }
        for wants_none in [source(None), JobSource::Blank] {
            assert_eq!(authorization(&wants_none, Unreadable).unwrap(), None);
        }
    }
}
