//! A disk whose device hangs and comes back: a file on a file system of its own, which is frozen
//! (FIFREEZE). Reads are answered meanwhile; a write stays in the kernel until it is thawed.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::network::run;

/// A file whose writes can be made to hang; removed when dropped.
#[derive(Debug)]
pub struct HangingDisk {
    directory: tempfile::TempDir,
}

/// While it lives, every write to the disk hangs. To be made after, and so dropped before, the
/// processes that write: one that waits for a hanging write cannot even be killed.
#[derive(Debug)]
#[must_use]
pub struct HangGuard<'a>(&'a HangingDisk);

impl HangingDisk {
    /// A disk of `mib`, all of it written once.
    ///
    /// # Errors
    /// When the file system cannot be made or mounted.
    pub fn new(mib: u32) -> Result<Self> {
        let directory = tempfile::tempdir().context("make a directory")?;
        let (image, mount) = (directory.path().join("image"), directory.path().join("m"));
        let bytes = u64::from(mib + OVERHEAD_MIB) << 20;
        File::create(&image)
            .and_then(|file| file.set_len(bytes))
            .context("make an image")?;
        run(Command::new("mkfs.ext4").arg("-q").arg(&image))?;
        fs::create_dir(&mount).context("make a mount point")?;
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(&mount))?;
        let disk = Self { directory };
        let mut file = File::create(disk.path()).context("make the disk")?;
        let piece = vec![0; 1 << 20];
        for _ in 0..mib {
            file.write_all(&piece).context("fill the disk")?;
        }
        file.sync_all().context("fill the disk")?;
        Ok(disk)
    }

    /// The disk's file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.mount().join("disk")
    }

    /// Lets every write hang, as long as the guard lives.
    ///
    /// # Errors
    /// When the kernel does not.
    pub fn hang(&self) -> Result<HangGuard<'_>> {
        self.freeze("--freeze")?;
        Ok(HangGuard(self))
    }

    fn freeze(&self, how: &str) -> Result<()> {
        run(Command::new("fsfreeze").arg(how).arg(self.mount()))
    }

    fn mount(&self) -> PathBuf {
        self.directory.path().join("m")
    }
}

impl Drop for HangGuard<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.freeze("--unfreeze") {
            eprintln!("{error:#}");
        }
    }
}

impl Drop for HangingDisk {
    fn drop(&mut self) {
        // Lazily: a process that still has the disk open may end after this.
        if let Err(error) = run(Command::new("umount").arg("--lazy").arg(self.mount())) {
            eprintln!("{error:#}");
        }
    }
}

/// A journal and the tables of a small ext4.
const OVERHEAD_MIB: u32 = 16;
