//! A qcow2 image as the disk that it holds.
//!
//! The library `imago` reads the tables and the clusters. What it takes on trust is checked before:
//! `bascule_image::Qcow2Header` says which images are taken at all, and tables and clusters behind the end of
//! the file, which would read as zeroes, are refused. No file is opened: the library gets the open one, and a
//! gate that denies every other.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use bascule_image::{QCOW2_HEADER_BYTES, Qcow2Fault, Qcow2Header};
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping};

type Storage = imago::file::File;

/// A qcow2 image that is read from its disk's beginning to the end.
#[derive(Debug)]
pub struct Qcow2Disk {
    image: FormatAccess<Storage>,
    header: Qcow2Header,
    /// The length of the file in bytes.
    file: u64,
    /// How much of the disk was read, in bytes.
    at: u64,
}

/// The next piece of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// So many bytes of the caller's buffer.
    Data(usize),
    /// So many bytes that read as zeroes: a multiple of the buffer's length, or all up to the disk's end.
    Zeroes(u64),
}

/// Why a disk cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The image is not one that is taken.
    #[error("the qcow2 image {0}")]
    Refused(#[from] Qcow2Fault),
    /// The image is damaged.
    #[error("the qcow2 image is damaged at byte {at} of the disk: {why}")]
    Damaged {
        /// The offset on the disk, in bytes.
        at: u64,
        /// What the library says.
        why: String,
    },
    /// The file cannot be read, whatever it contains.
    #[error("read the qcow2 image's file")]
    Io(#[source] io::Error),
}

impl Qcow2Disk {
    /// The disk in `file`.
    ///
    /// # Errors
    /// It is not an image that is taken, or the file cannot be read.
    pub fn open(file: File) -> Result<Self, DiskError> {
        let length = file.metadata().map_err(DiskError::Io)?.len();
        let mut head = vec![
            0;
            usize::try_from(length)
                .unwrap_or(usize::MAX)
                .min(QCOW2_HEADER_BYTES)
        ];
        file.read_exact_at(&mut head, 0).map_err(DiskError::Io)?;
        let header = Qcow2Header::parse(&head)?;
        header.check_file(length)?;
        let l1_bytes = usize::try_from(header.l1_bytes()).unwrap_or(usize::MAX);
        let mut l1 = vec![0; l1_bytes];
        file.read_exact_at(&mut l1, header.l1_offset)
            .map_err(DiskError::Io)?;
        header.check_l1(&l1, length)?;
        let image = open_image(file).map_err(|error| sort(error, 0))?;
        Ok(Self {
            image,
            header,
            file: length,
            at: 0,
        })
    }

    /// The disk's size in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.header.virtual_size
    }

    /// The next piece of the disk; none at its end. Data is read into `buffer`, and fills it but for the last
    /// piece.
    ///
    /// # Errors
    /// The image is damaged, or its file cannot be read.
    pub fn next_piece(&mut self, buffer: &mut [u8]) -> Result<Option<Piece>, DiskError> {
        let left = self.size() - self.at;
        if left == 0 {
            return Ok(None);
        }
        let whole = (buffer.len() as u64).min(left);
        let zeroes = self.zeroes(left.min(ZEROES_MAX))?;
        let piece = if zeroes >= whole {
            let remainder = if zeroes == left { 0 } else { zeroes % whole };
            self.at += zeroes - remainder;
            return Ok(Some(Piece::Zeroes(zeroes - remainder)));
        } else {
            usize::try_from(whole).unwrap_or(buffer.len())
        };
        self.check_clusters(whole)?;
        let into = buffer.get_mut(..piece).unwrap_or_default();
        self.image
            .read(into, self.at)
            .map_err(|error| sort(error, self.at))?;
        self.at += whole;
        Ok(Some(Piece::Data(piece)))
    }

    /// How many bytes from here on are not allocated or marked as zeroes; at most `max`.
    fn zeroes(&self, max: u64) -> Result<u64, DiskError> {
        let mut zeroes = 0;
        while zeroes < max {
            let (mapping, length) = self.mapping(self.at + zeroes, max - zeroes)?;
            if !matches!(mapping, Mapping::Zero { .. }) {
                break;
            }
            zeroes += length;
        }
        Ok(zeroes)
    }

    /// Refuses clusters of the next `length` bytes that are not in the file. The last one of a file may be cut
    /// short, as QEMU leaves it.
    fn check_clusters(&self, length: u64) -> Result<(), DiskError> {
        let mut checked = 0;
        while checked < length {
            let (mapping, mapped) = self.mapping(self.at + checked, length - checked)?;
            if let Mapping::Raw { offset, .. } = mapping {
                let last = (offset + mapped - 1) >> self.header.cluster_bits;
                if last << self.header.cluster_bits >= self.file {
                    let (what, file) = ("data", self.file);
                    return Err(Qcow2Fault::Outside { what, offset, file }.into());
                }
            }
            checked += mapped;
        }
        Ok(())
    }

    fn mapping(&self, at: u64, max: u64) -> Result<(Mapping<'_, Storage>, u64), DiskError> {
        let found = self.image.get_mapping(at, max);
        let (mapping, length) = found.map_err(|error| sort(error, at))?;
        if length == 0 {
            let why = "the disk ends before its size".to_owned();
            return Err(DiskError::Damaged { at, why });
        }
        Ok((mapping, length))
    }
}

/// Opens the image with the library alone.
fn open_image(file: File) -> io::Result<FormatAccess<Storage>> {
    let file = Storage::try_from(file)?;
    let image = Qcow2::<Storage>::builder(file).open(DenyImplicitOpenGate::default())?;
    Ok(FormatAccess::new(image))
}

/// Tells an error of the system from one of the image.
fn sort(error: io::Error, at: u64) -> DiskError {
    if error.raw_os_error().is_some() {
        return DiskError::Io(error);
    }
    let why = error.to_string();
    DiskError::Damaged { at, why }
}

/// How many zeroes are looked for at once, in bytes: the caller reports its progress between two pieces.
const ZEROES_MAX: u64 = 1 << 30;

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

    /// An image without clusters, of a disk of 1 MiB, with what is to be put at which offset.
    fn image(at: &Path, changes: &[(usize, &[u8])]) -> File {
        let mut bytes = vec![0; 4 << 16];
        let mut put = |at: usize, with: &[u8]| bytes[at..at + with.len()].copy_from_slice(with);
        put(0, b"QFI\xfb\0\0\0\x03");
        put(20, &16_u32.to_be_bytes());
        put(24, &(1_u64 << 20).to_be_bytes());
        put(36, &1_u32.to_be_bytes());
        put(40, &(3_u64 << 16).to_be_bytes());
        put(48, &(1_u64 << 16).to_be_bytes());
        put(96, &4_u32.to_be_bytes());
        put(100, &104_u32.to_be_bytes());
        for (at, with) in changes {
            put(*at, with);
        }
        std::fs::write(at, bytes).unwrap();
        File::open(at).unwrap()
    }

    /// Whether `file` is opened while `run` runs.
    fn is_opened(file: &Path, run: impl FnOnce()) -> bool {
        let watcher = inotify::init(CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(&watcher, file, WatchFlags::OPEN).unwrap();
        run();
        let now = Timespec::default();
        poll(&mut [PollFd::new(&watcher, PollFlags::IN)], Some(&now)).unwrap() > 0
    }

    /// A tenant's image could otherwise read any file of the node.
    #[test]
    fn no_file_that_an_image_names_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let secret = folder.path().join("secret");
        std::fs::write(&secret, vec![0x5a; 1 << 20]).unwrap();
        let name = secret.to_str().unwrap().as_bytes();
        let length = u32::try_from(name.len()).unwrap().to_be_bytes();
        let backing: &[(usize, &[u8])] = &[
            (8, &1024_u64.to_be_bytes()),
            (16, &length),
            (104, &0xe279_2aca_u32.to_be_bytes()),
            (108, &3_u32.to_be_bytes()),
            (112, b"raw"),
            (1024, name),
        ];
        let data: &[(usize, &[u8])] = &[
            (79, &[0b100]),
            (104, &0x4441_5441_u32.to_be_bytes()),
            (108, &length),
            (112, name),
        ];
        let path = folder.path().join("image");
        for (changes, says) in [(backing, "backing"), (data, "data file")] {
            let refuse = || {
                let error = Qcow2Disk::open(image(&path, changes)).unwrap_err();
                assert!(error.to_string().contains(says), "{error}");
                // The library by itself opens it neither.
                let error = open_image(image(&path, changes)).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
                assert!(error.to_string().contains("secret"), "{error}");
            };
            assert!(!is_opened(&secret, refuse), "{says}");
        }
        assert!(is_opened(&secret, || drop(File::open(&secret).unwrap())));
    }

    #[test]
    fn an_image_without_clusters_is_one_hole() {
        let folder = tempfile::tempdir().unwrap();
        let mut disk = Qcow2Disk::open(image(&folder.path().join("image"), &[])).unwrap();
        let piece = disk.next_piece(&mut [0; 4096]).unwrap();
        assert_eq!(piece, Some(Piece::Zeroes(1 << 20)));
        assert_eq!(disk.next_piece(&mut [0; 4096]).unwrap(), None);
    }
}
