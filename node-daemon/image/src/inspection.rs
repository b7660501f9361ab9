//! The inspection of one image while its bytes pass.

use crate::format::{FOOTER_BYTES, Format, Kind, by_footer, by_header};
use crate::kernel::{self, KernelFault, Notes};
use crate::qcow2::Qcow2Fault;
use crate::{INITRD_BYTES_MAX, KERNEL_BYTES_MAX};

/// What an image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A disk of the guest.
    Disk,
    /// The kernel.
    Kernel,
    /// The initial RAM disk.
    Initrd,
}

/// Why an image is not taken. The same bytes are refused again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Refusal {
    #[error(
        "the image is {format}, and a disk takes raw and qcow2 images, plain or compressed with gzip, xz or \
         zstd: {advice}", format = .0, advice = .0.disk_advice()
    )]
    NoDiskImage(Format),
    #[error("the qcow2 image {0}")]
    Qcow2(Qcow2Fault),
    #[error(
        "the download has {found} bytes or more, and at most {max} are fetched for a disk of {disk} bytes"
    )]
    DownloadTooLong { found: u64, max: u64, disk: u64 },
    #[error("{0}")]
    Kernel(KernelFault),
    #[error("{0}, not an initrd: that is a cpio archive, compressed or not")]
    NotAnInitrd(Format),
    #[error(
        "a kernel or another program, not an initrd: that is a cpio archive, compressed or not"
    )]
    InitrdIsAKernel,
    #[error("empty, not an initrd")]
    EmptyInitrd,
    #[error("the image has {found} bytes, and the disk {max}")]
    LongerThanDisk { found: u64, max: u64 },
    #[error("the kernel has {found} bytes; at most {} MiB ({max} bytes) are possible", .max >> 20)]
    KernelTooLong { found: u64, max: u64 },
    #[error("the initrd has {found} bytes; at most {} MiB ({max} bytes) are possible", .max >> 20)]
    InitrdTooLong { found: u64, max: u64 },
}

impl Role {
    /// Refuses an image of `found` bytes, or of at least that many, if it is too long. `disk` is the length of
    /// the disk that it goes to, in bytes.
    ///
    /// # Errors
    /// It is too long.
    pub const fn check_length(self, found: u64, disk: u64) -> Result<(), Refusal> {
        let (max, refusal) = match self {
            Self::Disk => (disk, Refusal::LongerThanDisk { found, max: disk }),
            Self::Kernel => {
                let max = KERNEL_BYTES_MAX;
                (max, Refusal::KernelTooLong { found, max })
            }
            Self::Initrd => {
                let max = INITRD_BYTES_MAX;
                (max, Refusal::InitrdTooLong { found, max })
            }
        };
        if found > max { Err(refusal) } else { Ok(()) }
    }

    /// Refuses a download of `found` bytes, or of at least that many, if it is too long. Kernels and initrds
    /// are taken as they come; a disk's image may be packed, and a qcow2 file has tables, and clusters that
    /// only its snapshots use.
    ///
    /// # Errors
    /// It is too long.
    pub const fn check_download(self, found: u64, disk: u64) -> Result<(), Refusal> {
        match self {
            Self::Disk => {
                let max = packed_bytes_max(disk);
                if found > max {
                    Err(Refusal::DownloadTooLong { found, max, disk })
                } else {
                    Ok(())
                }
            }
            Self::Kernel | Self::Initrd => self.check_length(found, disk),
        }
    }
}

/// The longest file, in bytes, that a disk of `disk` bytes is unpacked from: an eighth more than the disk, and
/// 64 MiB. A guess: the tables of a qcow2 file with clusters of 4 KiB are 1 % of it, with 512 bytes 4 %.
#[must_use]
pub const fn packed_bytes_max(disk: u64) -> u64 {
    disk.saturating_add(disk / 8).saturating_add(64 << 20)
}

/// The inspection of one image; a disk's as it is when unpacked.
#[derive(Debug)]
pub struct Inspection {
    role: Role,
    /// The first [`HEAD_BYTES`], as far as they have arrived.
    head: Vec<u8>,
    /// Whether the beginning has been judged.
    judged: bool,
    /// The last [`FOOTER_BYTES`] that have arrived.
    tail: Vec<u8>,
    notes: Notes,
    length: u64,
}

impl Inspection {
    /// Of an image for `role` of which nothing has arrived.
    #[must_use]
    pub fn new(role: Role) -> Self {
        Self {
            role,
            head: Vec::new(),
            judged: false,
            tail: Vec::new(),
            notes: Notes::default(),
            length: 0,
        }
    }

    /// Takes the next bytes of the image, in order.
    ///
    /// # Errors
    /// The beginning is recognized as something that the role does not take.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let room = HEAD_BYTES - self.head.len();
        let (head, rest) = bytes.split_at(room.min(bytes.len()));
        self.head.extend_from_slice(head);
        self.length += head.len() as u64;
        if self.head.len() == HEAD_BYTES {
            self.judge_head()?;
        }
        if self.role == Role::Kernel {
            self.notes.collect(self.length, rest);
        }
        self.length += rest.len() as u64;
        self.keep_tail(bytes);
        Ok(())
    }

    /// Takes the next `length` bytes of the image, all of which are zero.
    ///
    /// # Errors
    /// As [`Self::feed`].
    pub fn feed_zeroes(&mut self, length: u64) -> Result<(), Refusal> {
        const ZEROES: &[u8] = &[0; HEAD_BYTES + FOOTER_BYTES];
        // Only the beginning and the end of an image are looked at.
        let shown = usize::try_from(length).map_or(ZEROES.len(), |length| length.min(ZEROES.len()));
        self.feed(ZEROES.get(..shown).unwrap_or(ZEROES))?;
        self.length += length - shown as u64;
        Ok(())
    }

    /// Judges the whole image, after its last byte. For a kernel, call it only when the image's hash is
    /// right: an unrecognized kernel is refused for good.
    ///
    /// # Errors
    /// The role does not take the image.
    pub fn finish(mut self) -> Result<(), Refusal> {
        self.judge_head()?;
        match self.role {
            Role::Kernel => {
                kernel::check_whole(&self.head, &self.notes, self.length).map_err(Refusal::Kernel)
            }
            Role::Initrd if self.length == 0 => Err(Refusal::EmptyInitrd),
            Role::Initrd => Ok(()),
            Role::Disk => match self.tail.as_slice().try_into().ok().and_then(by_footer) {
                Some(format) => Err(Refusal::NoDiskImage(format)),
                None => Ok(()),
            },
        }
    }

    fn judge_head(&mut self) -> Result<(), Refusal> {
        if self.judged {
            return Ok(());
        }
        self.judged = true;
        match self.role {
            Role::Disk => match by_header(&self.head) {
                Some(format) => Err(Refusal::NoDiskImage(format)),
                None => Ok(()),
            },
            Role::Kernel => {
                kernel::check_header(&self.head).map_err(Refusal::Kernel)?;
                self.notes = Notes::locate(&self.head);
                self.notes.collect(0, &self.head);
                Ok(())
            }
            Role::Initrd => match by_header(&self.head) {
                Some(format) if matches!(format.kind, Kind::Disk | Kind::Archive) => {
                    Err(Refusal::NotAnInitrd(format))
                }
                None if kernel::is_kernel(&self.head) => Err(Refusal::InitrdIsAKernel),
                _ => Ok(()),
            },
        }
    }

    fn keep_tail(&mut self, bytes: &[u8]) {
        let last = bytes.get(bytes.len().saturating_sub(FOOTER_BYTES)..);
        self.tail.extend_from_slice(last.unwrap_or_default());
        let surplus = self.tail.len().saturating_sub(FOOTER_BYTES);
        self.tail.drain(..surplus);
    }
}

/// The beginning of an image that is kept to be judged: the headers of a PE or ELF file are within it.
const HEAD_BYTES: usize = 1 << 16;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::tests::{bzimage, pvh_elf};

    /// Feeds the image in pieces of every one of these lengths.
    fn inspect(role: Role, image: &[u8]) -> Result<(), Refusal> {
        let results = [1 << 20, 4096, 511].map(|piece: usize| {
            let mut inspection = Inspection::new(role);
            for piece in image.chunks(piece) {
                inspection.feed(piece)?;
            }
            inspection.finish()
        });
        assert!(results.iter().all(|result| *result == results[0]));
        results[0]
    }

    fn text(role: Role, image: &[u8]) -> String {
        inspect(role, image).unwrap_err().to_string()
    }

    #[test]
    fn a_vmdk_file_is_no_disk_and_the_message_names_the_format() {
        let mut image = vec![0; 1 << 18];
        image[..4].copy_from_slice(b"KDMV");
        let text = text(Role::Disk, &image);
        assert!(text.contains("is a VMDK image"), "{text}");
        assert!(text.contains("qemu-img convert -O qcow2"), "{text}");
    }

    #[test]
    fn a_hole_is_judged_as_the_zeroes_that_it_reads_as() {
        let mut footer = [0; FOOTER_BYTES];
        footer[..8].copy_from_slice(b"conectix");
        for hole in [0, 1, FOOTER_BYTES as u64, 1 << 16, 1 << 40] {
            let mut inspection = Inspection::new(Role::Disk);
            inspection.feed_zeroes(hole).unwrap();
            inspection.feed(&footer).unwrap();
            assert!(inspection.finish().is_err(), "{hole}");
            let mut inspection = Inspection::new(Role::Disk);
            inspection.feed(&[1; FOOTER_BYTES]).unwrap();
            inspection.feed(&footer).unwrap();
            inspection
                .feed_zeroes(hole.max(FOOTER_BYTES as u64))
                .unwrap();
            assert_eq!(inspection.finish(), Ok(()), "{hole}");
        }
    }

    #[test]
    fn a_packed_image_may_be_a_little_longer_than_its_disk_and_a_kernel_may_not() {
        let disk = 1 << 30;
        assert_eq!(Role::Disk.check_download(disk + (1 << 27), disk), Ok(()));
        let long = Role::Disk.check_download(packed_bytes_max(disk) + 1, disk);
        assert_eq!(
            long.unwrap_err().to_string(),
            "the download has 1275068417 bytes or more, and at most 1275068416 are fetched for a disk of \
             1073741824 bytes"
        );
        assert_eq!(packed_bytes_max(u64::MAX), u64::MAX);
        let kernel = Role::Kernel.check_download(KERNEL_BYTES_MAX + 1, 1 << 40);
        assert!(matches!(kernel, Err(Refusal::KernelTooLong { .. })));
    }

    #[test]
    fn a_recognized_beginning_is_refused_before_the_rest_arrives() {
        let mut inspection = Inspection::new(Role::Disk);
        let mut image = vec![0; HEAD_BYTES];
        image[..3].copy_from_slice(b"BZh");
        assert!(inspection.feed(&image).is_err());
    }

    #[test]
    fn a_fixed_vhd_is_recognized_by_its_end() {
        let mut image = vec![7; 70_000];
        image.truncate(70_000 / 512 * 512);
        assert_eq!(inspect(Role::Disk, &image), Ok(()));
        let mut footer = vec![0; FOOTER_BYTES];
        footer[..8].copy_from_slice(b"conectix");
        image.extend(footer);
        assert!(text(Role::Disk, &image).contains("VHD"));
    }

    #[test]
    fn raw_disks_of_any_length_pass() {
        for length in [0, 1, 511, 512, 513, HEAD_BYTES, HEAD_BYTES + 1] {
            assert_eq!(inspect(Role::Disk, &vec![0; length]), Ok(()), "{length}");
        }
    }

    #[test]
    fn kernels_that_boot_pass() {
        assert_eq!(inspect(Role::Kernel, &bzimage()), Ok(()));
        for at in [0x200, HEAD_BYTES - 10, HEAD_BYTES + 5000] {
            assert_eq!(inspect(Role::Kernel, &pvh_elf(at)), Ok(()), "{at}");
        }
    }

    #[test]
    fn an_initrd_may_be_compressed_and_is_no_kernel_disk_or_archive() {
        for begin in [
            b"070701".as_slice(),
            b"\x1f\x8b\x08",
            b"\xfd7zXZ\0",
            b"\x28\xb5\x2f\xfd",
            b"\x02\x21\x4c\x18",
            b"any file system",
        ] {
            assert_eq!(inspect(Role::Initrd, begin), Ok(()));
        }
        assert!(text(Role::Initrd, b"QFI\xfb").contains("a qcow2 image"));
        assert!(text(Role::Initrd, b"PK\x03\x04").contains("a zip archive"));
        assert_eq!(
            inspect(Role::Initrd, &bzimage()),
            Err(Refusal::InitrdIsAKernel)
        );
        assert_eq!(inspect(Role::Initrd, b""), Err(Refusal::EmptyInitrd));
    }

    #[test]
    fn lengths_are_limited_for_each_role() {
        let disk = 1 << 30;
        assert_eq!(Role::Disk.check_length(disk, disk), Ok(()));
        assert!(Role::Disk.check_length(disk + 1, disk).is_err());
        assert_eq!(Role::Kernel.check_length(KERNEL_BYTES_MAX, disk), Ok(()));
        let long = Role::Kernel.check_length(KERNEL_BYTES_MAX + 1, disk);
        assert_eq!(
            long.unwrap_err().to_string(),
            "the kernel has 134217729 bytes; at most 128 MiB (134217728 bytes) are possible"
        );
        assert_eq!(Role::Initrd.check_length(300 << 20, disk), Ok(()));
        assert!(
            Role::Initrd
                .check_length(INITRD_BYTES_MAX + 1, disk)
                .is_err()
        );
    }
}
