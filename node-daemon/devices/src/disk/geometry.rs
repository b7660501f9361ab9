//! The unit of direct I/O on a file or device: `block_bytes`.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::{
    AtFlags, FileType, OFlags, StatxFlags, fcntl_getfl, fstat, ioctl_blksszget, statx,
};

/// The unit of I/O on `file`, in bytes: the logical block of a device; the alignment that a file
/// system requires for direct I/O; 512 for buffered I/O, which has no alignment.
///
/// # Errors
/// When the file cannot be examined, or its unit is not a power of two from 512 to 4096: extents
/// are aligned to 4096 bytes.
pub fn block_bytes_of(file: impl AsFd) -> io::Result<u32> {
    let kind = FileType::from_raw_mode(fstat(&file)?.st_mode);
    let unit = if kind == FileType::BlockDevice {
        ioctl_blksszget(&file)?
    } else if fcntl_getfl(&file)?.contains(OFlags::DIRECT) {
        direct_unit(&file)?
    } else {
        UNIT_MIN
    };
    if unit.is_power_of_two() && (UNIT_MIN..=UNIT_MAX).contains(&unit) {
        Ok(unit)
    } else {
        Err(io::Error::other(format!(
            "unusable logical block size {unit}"
        )))
    }
}

fn direct_unit(file: impl AsFd) -> io::Result<u32> {
    // `STATX_DIOALIGN`, which rustix does not name yet.
    let flag = StatxFlags::from_bits_retain(0x2000);
    let found = statx(file, "", AtFlags::EMPTY_PATH, flag)?;
    if found.stx_mask & flag.bits() == 0 || found.stx_dio_offset_align == 0 {
        // Older kernels and file systems do not report it; all of them accept the largest unit.
        return Ok(UNIT_MAX);
    }
    let unit = found.stx_dio_offset_align.max(found.stx_dio_mem_align);
    Ok(unit.max(UNIT_MIN))
}

/// The smallest unit: a virtio-blk sector.
const UNIT_MIN: u32 = 512;
/// The largest unit: a volume block.
const UNIT_MAX: u32 = 4096;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn the_unit_of_a_file_is_the_alignment_of_its_direct_io() {
        let buffered = tempfile::tempfile().unwrap();
        assert_eq!(block_bytes_of(&buffered).unwrap(), 512);
        let dir = tempfile::tempdir().unwrap();
        let mut options = std::fs::OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create(true)
            .custom_flags(libc::O_DIRECT);
        // Some file systems have no direct I/O, and then no alignment.
        if let Ok(direct) = options.open(dir.path().join("disk")) {
            let unit = block_bytes_of(&direct).unwrap();
            assert!(
                unit.is_power_of_two() && (512..=4096).contains(&unit),
                "{unit}"
            );
        }
    }

    /// A loop device, detached on drop.
    struct Loop(String);

    impl Loop {
        fn new(file: &std::path::Path, sector_bytes: u32) -> Self {
            let sector = format!("--sector-size={sector_bytes}");
            let made = Command::new("losetup")
                .args(["--find", "--show", &sector])
                .arg(file)
                .output();
            let made = made.unwrap();
            assert!(
                made.status.success(),
                "{}",
                String::from_utf8_lossy(&made.stderr)
            );
            Self(String::from_utf8(made.stdout).unwrap().trim().to_owned())
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let gone = Command::new("losetup").args(["--detach", &self.0]).status();
            assert!(
                gone.is_ok_and(|status| status.success()),
                "{} stays",
                self.0
            );
        }
    }

    #[test]
    fn a_block_device_has_the_unit_of_its_logical_block() {
        let privileged = rustix::process::geteuid().is_root();
        if !privileged || !std::path::Path::new("/dev/loop-control").exists() {
            assert!(
                std::env::var_os("CI").is_none(),
                "CI needs root and loop devices"
            );
            eprintln!("skipped: needs root and loop devices");
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        for sector_bytes in [512, 4096] {
            let device = Loop::new(file.path(), sector_bytes);
            let opened = std::fs::File::open(&device.0).unwrap();
            assert_eq!(block_bytes_of(&opened).unwrap(), sector_bytes);
        }
    }
}
