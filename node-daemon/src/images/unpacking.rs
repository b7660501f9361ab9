//! From a download to a disk, through what unpacks it.
//!
//! | the image is | it goes |
//! |---|---|
//! | raw | straight to the disk |
//! | a compressed raw image | through a process that decompresses it, to the disk |
//! | a qcow2 image | to a file of the node (one of the node's allow-list stays where it is), then through a process that reads its tables, to the disk |
//! | a compressed qcow2 image | through a process that decompresses it, to a file, and on as above |
//!
//! The processes have neither network, files nor the volume (`unpack.rs`). The download is hashed as it comes,
//! before anything is unpacked.

use std::fs::File;
use std::io::{Cursor, Read};

use anyhow::{Context, Result};
use bascule_image::{Packing, Qcow2Fault, Qcow2Header, Refusal, packing};
use bascule_types::Bytes;

use super::blocks::{CHUNK_BYTES, chunk_buffer};
use super::download::{Download, Origin};
use super::filler::Filler;
use super::final_failure::is_final;
use super::job::ImportJob;
use super::length_limit::LengthLimit;
use super::pieces::{Piece, read_piece};
use super::pump::Pump;
use super::read_full::read_full;
use super::spool::Spool;
use super::unpacker::{decompress, unpack_qcow2};

/// Fills the disk with the image's own bytes.
pub(super) fn fill_as_it_is(
    mut download: Download,
    origin: Origin,
    mut filler: Filler<'_>,
) -> Result<Bytes> {
    filler.copy(|chunk| download.read(chunk))?;
    download.finish(origin)?;
    filler.finish()
}

/// Fills the disk from an image in one of the formats that a disk takes.
///
/// # Ordering
/// A damage that the image's beginning does not show is told only when all of the image has come with the
/// right hash: another copy of it might be whole. The tables of a qcow2 image are read only then.
pub(super) fn fill_unpacked(
    job: &ImportJob,
    (mut download, origin): (Download, Origin),
    mut filler: Filler<'_>,
    limit: LengthLimit,
) -> Result<Bytes> {
    let head = download.peek(HEAD_BYTES)?;
    match packing(&head) {
        Packing::Raw => return fill_as_it_is(download, origin, filler),
        Packing::Foreign(format) => return Err(Refusal::NoDiskImage(format).into()),
        Packing::Qcow2 => {
            check_qcow2(&head, limit)?;
            let image = match &origin.file {
                Some(file) => file.try_clone().context("share the file")?,
                None => spool(job, &filler, limit, |chunk| download.read(chunk))?,
            };
            download.finish(origin)?;
            copy_qcow2(image, &mut filler)?;
        }
        Packing::Compressed(compression) => {
            let (input, output, unpacker) = decompress(compression)?;
            let pump = Pump::start(download, input)?;
            let image = take_contents(job, output, &mut filler, limit).map_err(|error| {
                if is_final(&error) {
                    error.context(format!("in the {} file", compression.name()))
                } else {
                    error
                }
            })?;
            pump.finish()?.finish(origin)?;
            unpacker.finish()?;
            if let Some(image) = image {
                copy_qcow2(image, &mut filler)?;
            }
        }
    }
    filler.finish()
}

/// Fills the disk from the contents of a compressed file; returns them instead if they are a qcow2 image.
fn take_contents(
    job: &ImportJob,
    mut output: impl Read,
    filler: &mut Filler<'_>,
    limit: LengthLimit,
) -> Result<Option<File>> {
    let mut head = vec![0; HEAD_BYTES];
    let length = read_full(&mut output, &mut head).context("read the image")?;
    head.truncate(length);
    let is_qcow2 = packing(&head) == Packing::Qcow2;
    if is_qcow2 {
        check_qcow2(&head, limit)?;
    }
    let mut contents = Cursor::new(head).chain(output);
    let read = |chunk: &mut [u8]| read_full(&mut contents, chunk).context("read the image");
    if is_qcow2 {
        return spool(job, filler, limit, read).map(Some);
    }
    // What is neither raw the filler refuses.
    filler.copy(read)?;
    Ok(None)
}

/// Refuses a qcow2 image by its beginning.
fn check_qcow2(head: &[u8], limit: LengthLimit) -> Result<()> {
    let checked = Qcow2Header::parse(head).and_then(|header| header.check_size(limit.disk.0));
    match checked {
        // The rest may not have come: that is told when the download has ended.
        Ok(()) | Err(Qcow2Fault::NoHeader { .. }) => Ok(()),
        Err(fault) => Err(Refusal::Qcow2(fault).into()),
    }
}

/// Keeps a whole image in a file of the node.
fn spool(
    job: &ImportJob,
    filler: &Filler<'_>,
    limit: LengthLimit,
    mut read: impl FnMut(&mut [u8]) -> Result<usize>,
) -> Result<File> {
    let mut spool = Spool::begin(&job.spool, limit)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let length = read(&mut chunk)?;
        if length == 0 {
            return spool.finish();
        }
        spool.append(chunk.get(..length).unwrap_or_default())?;
        filler.report()?;
    }
}

/// Fills the disk from a whole qcow2 image.
fn copy_qcow2(image: File, filler: &mut Filler<'_>) -> Result<()> {
    let (mut pieces, unpacker) = unpack_qcow2(image)?;
    let mut buffer = chunk_buffer();
    while let Some(piece) = read_piece(&mut pieces, buffer.bytes_mut())? {
        match piece {
            Piece::Data(length) => filler.data(buffer.bytes_mut(), length)?,
            Piece::Zeroes(length) => filler.hole(length)?,
        }
    }
    unpacker.finish()
}

/// More than any format's header.
const HEAD_BYTES: usize = 64 << 10;
