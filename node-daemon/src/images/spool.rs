//! A qcow2 image while it is imported: its tables are read in any order, so the whole file must be there.
//!
//! The file has no name: it is gone with the last process that has it open, however that ends.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::fstatvfs;

use super::length_limit::LengthLimit;
use super::zeroes::is_zero;

/// The file, to be written from its beginning to its end.
pub(super) struct Spool {
    file: File,
    limit: LengthLimit,
    length: u64,
}

impl Spool {
    /// Begins a file in `folder`.
    pub(super) fn begin(folder: &Path, limit: LengthLimit) -> Result<Self> {
        let file = tempfile::tempfile_in(folder);
        let file = file.with_context(|| format!("make a file in {}", folder.display()))?;
        Ok(Self {
            file,
            limit,
            length: 0,
        })
    }

    /// Appends bytes; a hole for zeroes.
    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let length = self.length + bytes.len() as u64;
        self.limit.check_packed(length)?;
        if is_zero(bytes) {
            let skip = i64::try_from(bytes.len()).context("the length of a hole")?;
            self.file
                .seek(SeekFrom::Current(skip))
                .context("spool the image")?;
        } else {
            self.check_room(bytes.len())?;
            self.file.write_all(bytes).context("spool the image")?;
        }
        self.length = length;
        Ok(())
    }

    /// The whole file.
    pub(super) fn finish(self) -> Result<File> {
        // For a hole at the end.
        self.file.set_len(self.length).context("spool the image")?;
        Ok(self.file)
    }

    fn check_room(&self, bytes: usize) -> Result<()> {
        let stat = fstatvfs(&self.file).context("measure the node's file system")?;
        let (free, all) = (
            stat.f_bavail.saturating_mul(stat.f_frsize),
            stat.f_blocks.saturating_mul(stat.f_frsize),
        );
        if !leaves_room(free, all, bytes as u64) {
            bail!(
                "a qcow2 image is kept on the node while it is unpacked, and the file system of /var/lib/bascule \
                 there has {free} of {all} bytes left: at least {FREE_PERCENT_MIN} % are left free"
            );
        }
        Ok(())
    }
}

/// Whether a file system of which `free` of `all` bytes are free may take so many more.
fn leaves_room(free: u64, all: u64, more: u64) -> bool {
    free.saturating_sub(more) >= all / 100 * FREE_PERCENT_MIN
}

/// With less free, the kubelet evicts pods (`nodefs.available<10%`; Kubernetes, "Node-pressure eviction").
const FREE_PERCENT_MIN: u64 = 12;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::is_final;
    use bascule_types::{Bytes, DiskRole};
    use std::os::unix::fs::{FileExt, MetadataExt};

    const LIMIT: LengthLimit = LengthLimit {
        role: DiskRole::Data,
        disk: Bytes(1 << 20),
    };

    #[test]
    fn what_is_appended_is_in_a_file_without_a_name_and_zeroes_are_holes() {
        let folder = tempfile::tempdir().unwrap();
        let mut spool = Spool::begin(folder.path(), LIMIT).unwrap();
        for bytes in [&[7; 5][..], &vec![0; 8 << 20], &[7; 5], &vec![0; 1 << 20]] {
            spool.append(bytes).unwrap();
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let file = spool.finish().unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), (9 << 20) + 10);
        assert!(metadata.blocks() * 512 < 1 << 20, "{metadata:?}");
        let mut bytes = [1; 11];
        file.read_exact_at(&mut bytes, (8 << 20) - 1).unwrap();
        assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 7, 7, 7, 7, 7]);
    }

    #[test]
    fn an_image_that_is_longer_than_the_limit_is_refused_for_good() {
        let folder = tempfile::tempdir().unwrap();
        let mut spool = Spool::begin(folder.path(), LIMIT).unwrap();
        let max = bascule_image::packed_bytes_max(1 << 20);
        let zeroes = vec![0; usize::try_from(max).unwrap()];
        spool.append(&zeroes).unwrap();
        let error = spool.append(&[0]).unwrap_err();
        assert!(is_final(&error), "{error}");
    }

    #[test]
    fn a_part_of_the_nodes_file_system_stays_free() {
        assert!(leaves_room(500, 1000, 300));
        assert!(leaves_room(120, 1000, 0));
        assert!(!leaves_room(120, 1000, 1));
        assert!(!leaves_room(0, 1000, 1));
    }
}
