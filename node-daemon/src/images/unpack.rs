//! `bascule-import unpack`: unpacks an image from standard input to standard output.
//!
//! It reads hostile bytes, so it has nothing: before the first byte it gives up opening files and sockets and
//! gaining privileges, and bounds its memory. It runs as user nobody with an empty environment.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::AsFd;

use anyhow::{Context, Result, bail};
use bascule_image::Compression;
use bascule_image_unpack::{Decompressor, DiskError, Piece, Qcow2Disk};
use rustix::process::{
    Resource, Rlimit, Signal, getppid, set_parent_process_death_signal, setrlimit,
};
use rustix::thread::set_no_new_privs;

use super::blocks::CHUNK_BYTES;
use super::final_failure::FinalFailure;
use super::pieces::{write_data, write_zeroes};

/// `bascule-import unpack`
#[derive(Debug, clap::Args)]
pub(crate) struct UnpackArgs {
    /// The process that starts this one, and that this one does not outlive
    #[arg(long)]
    parent: u32,
    /// What standard input is
    #[arg(value_enum)]
    format: UnpackFormat,
}

/// What is unpacked. A compressed file becomes its contents, a qcow2 image (a file that can be read anywhere)
/// the pieces of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum UnpackFormat {
    Gzip,
    Xz,
    Zstd,
    Qcow2,
}

impl UnpackFormat {
    pub(super) const fn of(compression: Compression) -> Self {
        match compression {
            Compression::Gzip => Self::Gzip,
            Compression::Xz => Self::Xz,
            Compression::Zstd => Self::Zstd,
        }
    }

    /// As the command line says it.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Unpacks standard input.
pub(crate) fn unpack(args: &UnpackArgs) -> Result<()> {
    // From here on, a death of the parent is this process' own.
    set_parent_process_death_signal(Some(Signal::KILL)).context("follow the parent")?;
    let parent = getppid().and_then(|pid| u32::try_from(pid.as_raw_pid()).ok());
    if parent != Some(args.parent) {
        bail!("the import has ended");
    }
    let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    confine().context("give up rights")?;
    match args.format {
        UnpackFormat::Gzip => decompress(Compression::Gzip, input, output),
        UnpackFormat::Xz => decompress(Compression::Xz, input, output),
        UnpackFormat::Zstd => decompress(Compression::Zstd, input, output),
        UnpackFormat::Qcow2 => send_disk(input, output),
    }
}

/// From here on no file descriptor can be made: no file is opened, no network reached.
fn confine() -> Result<()> {
    set_no_new_privs(true)?;
    for (resource, limit) in [
        (Resource::Nofile, 0),
        (Resource::As, ADDRESS_SPACE_BYTES),
        (Resource::Core, 0),
    ] {
        let (current, maximum) = (Some(limit), Some(limit));
        setrlimit(resource, Rlimit { current, maximum })?;
    }
    Ok(())
}

fn decompress(compression: Compression, input: impl Read, mut output: impl Write) -> Result<()> {
    let file = BufReader::with_capacity(INPUT_BYTES, input);
    let mut contents = Decompressor::new(compression, file);
    let mut buffer = vec![0; OUTPUT_BYTES];
    loop {
        let count = contents.read(&mut buffer).map_err(|error| {
            let name = compression.name();
            match error.kind() {
                io::ErrorKind::UnexpectedEof => {
                    FinalFailure(format!("the {name} file is truncated"))
                }
                _ => FinalFailure(format!("the {name} file is damaged: {error}")),
            }
        })?;
        if count == 0 {
            return Ok(());
        }
        let bytes = buffer.get(..count).unwrap_or_default();
        output.write_all(bytes).context("write to the writer")?;
    }
}

fn send_disk(image: File, mut output: impl Write) -> Result<()> {
    let mut disk = Qcow2Disk::open(image).map_err(refusal)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Some(piece) = disk.next_piece(&mut chunk).map_err(refusal)? {
        let sent = match piece {
            Piece::Data(length) => write_data(&mut output, chunk.get(..length).unwrap_or_default()),
            Piece::Zeroes(length) => write_zeroes(&mut output, length),
        };
        sent.context("write to the writer")?;
    }
    Ok(())
}

fn refusal(error: DiskError) -> anyhow::Error {
    match error {
        DiskError::Io(_) => error.into(),
        DiskError::Refused(_) | DiskError::Damaged { .. } => FinalFailure(error.to_string()).into(),
    }
}

/// All of the process: twice the most that a decompressor asks for (a window of 128 MiB that is copied as it
/// grows) or that the tables of a qcow2 image of 64 TiB need.
const ADDRESS_SPACE_BYTES: u64 = 1 << 30;
/// A pipe holds as much (pipe(7)).
const INPUT_BYTES: usize = 64 << 10;
const OUTPUT_BYTES: usize = 256 << 10;
