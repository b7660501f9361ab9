//! Disk images as distributions publish them, with contents that the probe guest checks.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use bascule_probe_wire::block::{BLOCK_BYTES, Block};

/// How a raw image is packed.
#[derive(Clone, Copy, Debug, Default)]
pub struct ImagePacking {
    /// The options of `qemu-img convert -O qcow2`; none for a raw image.
    pub qcow2: Option<&'static str>,
    /// The program around it: gzip, xz or zstd.
    pub compressor: Option<&'static str>,
}

/// A raw image of `bytes` bytes whose first `slots` blocks are those of a guest that has written up to number
/// `last`. What it has not written is zeroes.
#[must_use]
pub fn numbered_disk(bytes: usize, slots: u64, last: u64) -> Vec<u8> {
    let mut image = vec![0; bytes];
    let (blocks, _) = image.as_chunks_mut::<BLOCK_BYTES>();
    let first = last.saturating_sub(slots - 1).max(1);
    for seq in first..=last {
        let slot = usize::try_from(seq % slots).unwrap_or(usize::MAX);
        if let Some(block) = blocks.get_mut(slot) {
            Block { seq, boot: 1 }.encode(block);
        }
    }
    image
}

/// Packs the raw image in `raw`; returns the file, which lies beside it.
///
/// # Errors
/// When a program is missing or fails.
pub fn pack(raw: &Path, packing: ImagePacking) -> Result<PathBuf> {
    let mut file = raw.to_owned();
    if let Some(options) = packing.qcow2 {
        let qcow2 = raw.with_extension("unpacked");
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "qcow2"]);
        convert
            .args(options.split_whitespace())
            .arg(&file)
            .arg(&qcow2);
        must(&mut convert)?;
        file = qcow2;
    }
    if let Some(compressor) = packing.compressor {
        let packed = must(Command::new(compressor).arg("-c").arg(&file))?.stdout;
        // A format is told by a file's contents: the name says nothing.
        file = raw.with_extension("packed");
        fs::write(&file, packed).context("write an image")?;
    }
    Ok(file)
}

fn must(command: &mut Command) -> Result<Output> {
    let output = command
        .output()
        .with_context(|| format!("run {command:?}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {errors}");
    Ok(output)
}
