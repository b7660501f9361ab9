//! The disk's data path, beside the raw device: a driver of the device model (virtqueues in guest memory, one
//! notification per batch, one interrupt wait), the real virtio-blk device, gate and io_uring; and fio's
//! io_uring engine on the same file, with the same requests in flight.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

mod driver;
mod fio;

/// What is done again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Work {
    pub(crate) name: &'static str,
    pub(crate) is_write: bool,
    /// Bytes of one request.
    pub(crate) bytes: usize,
    /// Requests in flight.
    pub(crate) depth: u16,
}

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Figures {
    pub(crate) per_second: f64,
    /// The median of the times from a request's submission to its completion.
    pub(crate) median: Duration,
    /// CPU time per request, of the driver and of the device.
    pub(crate) cpu: Duration,
}

/// Measures every work on a file of its own in `directory`, `rounds` times by turns, and prints the medians.
pub(crate) fn run(directory: Option<&Path>, rounds: u32) -> Result<()> {
    let directory = directory.map_or_else(std::env::temp_dir, Path::to_owned);
    let named = tempfile::NamedTempFile::new_in(&directory)
        .with_context(|| format!("a file in {}", directory.display()))?;
    let path = named.path().to_owned();
    fill(named.as_file())?;
    println!(
        "\ndisk, random requests on a file of {FILE_MIB} MiB in {}",
        directory.display()
    );
    println!(
        "{:<26}{:>12}{:>12}{:>8}{:>12}{:>10}{:>10}{:>12}{:>10}",
        "", "bascule /s", "fio /s", "ratio", "p50 (us)", "fio", "added", "CPU (us)", "fio"
    );
    for work in WORKS {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        // Turn by turn, so that a machine that is busy for a while is so for both.
        for _ in 0..rounds {
            ours.push(driver::measure(&open(&path)?, work, TIME).context("the device")?);
            theirs.push(fio::measure(&path, work, TIME).context("fio")?);
        }
        print(work, middle(&ours)?, middle(&theirs)?);
    }
    Ok(())
}

fn print(work: Work, ours: Figures, theirs: Figures) {
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    println!(
        "{:<26}{:>12.0}{:>12.0}{:>8.2}{:>12.1}{:>10.1}{:>10.1}{:>12.1}{:>10.1}",
        work.name,
        ours.per_second,
        theirs.per_second,
        ours.per_second / theirs.per_second,
        micros(ours.median),
        micros(theirs.median),
        micros(ours.median) - micros(theirs.median),
        micros(ours.cpu),
        micros(theirs.cpu),
    );
}

/// The median of each figure by itself.
fn middle(all: &[Figures]) -> Result<Figures> {
    let mut rates: Vec<f64> = all.iter().map(|figures| figures.per_second).collect();
    rates.sort_by(f64::total_cmp);
    let middle = |time: fn(&Figures) -> Duration| {
        let mut times: Vec<Duration> = all.iter().map(time).collect();
        times.sort_unstable();
        times.get(times.len() / 2).copied().context("no round")
    };
    Ok(Figures {
        per_second: *rates.get(rates.len() / 2).context("no round")?,
        median: middle(|figures| figures.median)?,
        cpu: middle(|figures| figures.cpu)?,
    })
}

/// Writes the whole file, so that no request meets a hole.
fn fill(mut file: &File) -> Result<()> {
    let piece: Vec<u8> = (0..1 << 20).map(|at: u32| at.to_le_bytes()[0]).collect();
    for _ in 0..FILE_MIB {
        file.write_all(&piece)?;
    }
    file.sync_all().context("write the file")
}

fn open(path: &PathBuf) -> Result<File> {
    let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits())?;
    let mut options = File::options();
    options.read(true).write(true).custom_flags(direct);
    options
        .open(path)
        .with_context(|| format!("open {} for direct I/O", path.display()))
}

const WORKS: [Work; 6] = [
    Work::new("read 4 KiB, 1 in flight", false, 4096, 1),
    Work::new("write 4 KiB, 1 in flight", true, 4096, 1),
    Work::new("read 4 KiB, 32 in flight", false, 4096, 32),
    Work::new("write 4 KiB, 32 in flight", true, 4096, 32),
    Work::new("read 128 KiB, 8 in flight", false, 128 << 10, 8),
    Work::new("write 128 KiB, 8 in flight", true, 128 << 10, 8),
];

impl Work {
    const fn new(name: &'static str, is_write: bool, bytes: usize, depth: u16) -> Self {
        Self {
            name,
            is_write,
            bytes,
            depth,
        }
    }
}

pub(crate) const FILE_MIB: u64 = 512;
const TIME: Duration = Duration::from_secs(3);
