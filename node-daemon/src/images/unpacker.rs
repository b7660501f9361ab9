//! `bascule-import unpack` as its parent sees it.

use std::fs::File;
use std::process::{ChildStdin, ChildStdout, Stdio};

use anyhow::Result;
use bascule_image::Compression;

use super::unpack::UnpackFormat;
use super::worker::Worker;

/// Starts to decompress what is written to the input.
pub(super) fn decompress(compression: Compression) -> Result<(ChildStdin, ChildStdout, Worker)> {
    let mut worker = start(UnpackFormat::of(compression), Stdio::piped())?;
    Ok((worker.take_input()?, worker.take_output()?, worker))
}

/// Starts to unpack a qcow2 image into the pieces of its disk.
pub(super) fn unpack_qcow2(image: File) -> Result<(ChildStdout, Worker)> {
    let mut worker = start(UnpackFormat::Qcow2, image.into())?;
    Ok((worker.take_output()?, worker))
}

fn start(format: UnpackFormat, input: Stdio) -> Result<Worker> {
    let mut command = Worker::command("unpack");
    let parent = std::process::id().to_string();
    command
        .args(["--parent", &parent, format.word()])
        .stdin(input);
    Worker::start(&mut command, "unpacked")
}
