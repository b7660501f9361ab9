//! The backing device of a volume: a block device, or a plain file in a lab. What the threads of a process
//! need of it is [`SharedDevice`], so that they run on a simulated disk too.
//!
//! Reads and writes are `pread` and `pwrite` with `O_DIRECT`, from buffers aligned to 4096 bytes.
//! A process exits only after a `pwrite` in progress has returned. A file on a file system without `O_DIRECT` (tmpfs) is opened without it,
//! with a warning; a block device never is.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use bascule_types::{AlignedBuffer, Bytes, Lba, VmUid};
use bascule_volume_format::{BLOCK_BYTES, BLOCK_BYTES_U64, BlockStore};
use bascule_volume_protocol::WriterId;
use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom};

use crate::writer_lock::{self, WriterLock, writer_of};

/// The backing device of one volume, as one process uses it.
pub trait SharedDevice: fmt::Debug + Send + Sync {
    /// A handle for one thread's metadata I/O.
    fn handle(&self) -> Handle;

    /// Opens the path again after an I/O error, and uses the new descriptor if `accept` returns true.
    /// Returns whether it did.
    ///
    /// # Errors
    /// Those of `open(2)`.
    fn reopen_if(&self, accept: &mut dyn FnMut(Handle) -> bool) -> io::Result<bool>;

    /// Checks that the path still names the open device.
    ///
    /// # Errors
    /// `NotFound` when the path names nothing or another device.
    fn check_present(&self) -> io::Result<()>;

    /// The logical block size in bytes: the alignment of direct I/O.
    fn block_bytes(&self) -> u32;

    /// The device in an open file description of its own, locked for `writer`
    /// ([`crate::writer_lock`]), and which device that is.
    ///
    /// # Errors
    /// The system's.
    fn open_for(&self, writer: WriterId) -> io::Result<(OwnedFd, Identity)>;

    /// What is open now.
    fn identity(&self) -> Identity;

    /// Whether a request of `writer`, which was handed these devices, may be in flight.
    fn writer_lock(&self, writer: WriterId, handed: &[Identity]) -> WriterLock;

    /// Makes a range read as zeroes, by WRITE ZEROES if the device supports it. Durable only after a
    /// flush.
    ///
    /// # Errors
    /// Those of the device.
    fn zero(&self, start: Lba, length: Bytes) -> io::Result<()>;
}

/// An open device that can be re-opened after its path was lost.
#[derive(Clone, Debug)]
pub struct Device {
    path: PathBuf,
    access: Access,
    current: Arc<RwLock<Arc<Opened>>>,
}

/// How a device is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// For the offline check.
    ReadOnly,
    /// For formatting and serving.
    ReadWrite,
}

#[derive(Debug)]
struct Opened {
    file: File,
    is_block: bool,
    identity: Identity,
}

/// What tells a device or file from another one at the same path. As text: three numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The file system (`st_dev`).
    pub device: u64,
    /// The inode there, of a block device's node.
    pub inode: u64,
    /// Of a block device, major and minor number (`st_rdev`).
    pub special: u64,
}

impl Identity {
    /// From its text; none if that is something else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split(' ').map(str::parse);
        let mut next = || numbers.next()?.ok();
        let (device, inode, special) = (next()?, next()?, next()?);
        numbers.next().is_none().then_some(Self {
            device,
            inode,
            special,
        })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.device, self.inode, self.special)
    }
}

impl Device {
    /// Opens the device.
    ///
    /// # Errors
    /// Those of `open(2)`; [`io::ErrorKind::InvalidInput`] for a directory or a character device.
    pub fn open(path: &Path, access: Access) -> io::Result<Self> {
        let opened = open(path, access)?;
        Ok(Self {
            path: path.to_owned(),
            access,
            current: Arc::new(RwLock::new(Arc::new(opened))),
        })
    }

    /// The size of the device, as it is now.
    ///
    /// # Errors
    /// Those of the system call.
    pub fn size(&self) -> io::Result<Bytes> {
        Ok(Bytes(rustix::fs::seek(
            &self.current().file,
            SeekFrom::End(0),
        )?))
    }

    /// Whether the device is a block device, not a file.
    #[must_use]
    pub fn is_block(&self) -> bool {
        self.current().is_block
    }

    fn write_zeroes(&self, start: Lba, length: Bytes) -> io::Result<()> {
        let blocks = length.0 / BLOCK_BYTES as u64;
        let zeroes = vec![0; BLOCK_BYTES * ZERO_CHUNK_BLOCKS];
        let mut handle = self.handle();
        let mut done = 0;
        while done < blocks {
            let left = usize::try_from(blocks - done).unwrap_or(ZERO_CHUNK_BLOCKS);
            let count = left.min(ZERO_CHUNK_BLOCKS);
            handle.write(Lba(start.0 + done), &zeroes[..count * BLOCK_BYTES])?;
            done += count as u64;
        }
        Ok(())
    }

    fn current(&self) -> Arc<Opened> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl SharedDevice for Device {
    fn handle(&self) -> Handle {
        Handle(Box::new(DirectIo {
            device: self.clone(),
            buffer: AlignedBuffer::new(0, BLOCK_BYTES),
        }))
    }

    fn reopen_if(&self, accept: &mut dyn FnMut(Handle) -> bool) -> io::Result<bool> {
        let candidate = Self::open(&self.path, self.access)?;
        if !accept(candidate.handle()) {
            return Ok(false);
        }
        let opened = candidate.current();
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = opened;
        Ok(true)
    }

    fn check_present(&self) -> io::Result<()> {
        let now = identity(&std::fs::metadata(&self.path)?);
        if now == self.current().identity {
            Ok(())
        } else {
            let what = "the path now names another device or file";
            Err(io::Error::new(io::ErrorKind::NotFound, what))
        }
    }

    fn block_bytes(&self) -> u32 {
        let opened = self.current();
        if !opened.is_block {
            return 4096;
        }
        let text = sysfs(&opened, "queue/logical_block_size");
        text.and_then(|text| text.trim().parse().ok())
            .unwrap_or(4096)
    }

    fn open_for(&self, writer: WriterId) -> io::Result<(OwnedFd, Identity)> {
        let opened = self.current();
        let descriptor = reopen(&opened)?;
        writer_lock::hold(&descriptor, writer)?;
        Ok((descriptor, opened.identity))
    }

    fn identity(&self) -> Identity {
        self.current().identity
    }

    fn writer_lock(&self, writer: WriterId, handed: &[Identity]) -> WriterLock {
        let opened = self.current();
        if handed.is_empty() || handed.iter().any(|device| *device != opened.identity) {
            return WriterLock::NoProof;
        }
        match writer_lock::is_held(&opened.file, writer) {
            Ok(true) => WriterLock::Held,
            Ok(false) => WriterLock::Free,
            Err(error) => {
                tracing::warn!(%error, "cannot ask for a writer's lock");
                WriterLock::NoProof
            }
        }
    }

    fn zero(&self, start: Lba, length: Bytes) -> io::Result<()> {
        let offset = start.lba_to_bytes().map_err(io::Error::other)?;
        let opened = self.current();
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&opened.file, flags, offset.0, length.0) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INVAL) => {
                self.write_zeroes(start, length)
            }
            Err(errno) => Err(errno.into()),
        }
    }
}

/// One thread's access to the device.
pub struct Handle(pub Box<dyn BlockStore + Send>);

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Handle")
    }
}

impl BlockStore for Handle {
    fn blocks(&mut self) -> io::Result<u64> {
        self.0.blocks()
    }

    fn read(&mut self, lba: Lba, blocks: &mut [u8]) -> io::Result<()> {
        self.0.read(lba, blocks)
    }

    fn write(&mut self, lba: Lba, blocks: &[u8]) -> io::Result<()> {
        self.0.write(lba, blocks)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Direct I/O through a buffer of its own.
struct DirectIo {
    device: Device,
    buffer: AlignedBuffer,
}

impl DirectIo {
    /// The first `length` bytes of the aligned buffer, which grows as needed.
    fn aligned(&mut self, length: usize) -> &mut [u8] {
        if self.buffer.len() < length {
            self.buffer = AlignedBuffer::new(length, BLOCK_BYTES);
        }
        &mut self.buffer.bytes_mut()[..length]
    }
}

impl BlockStore for DirectIo {
    fn blocks(&mut self) -> io::Result<u64> {
        Ok(self.device.size()?.0 / BLOCK_BYTES_U64)
    }

    fn read(&mut self, lba: Lba, blocks: &mut [u8]) -> io::Result<()> {
        let offset = lba.lba_to_bytes().map_err(io::Error::other)?;
        let opened = self.device.current();
        let buffer = self.aligned(blocks.len());
        opened.file.read_exact_at(buffer, offset.0)?;
        blocks.copy_from_slice(buffer);
        Ok(())
    }

    fn write(&mut self, lba: Lba, blocks: &[u8]) -> io::Result<()> {
        let offset = lba.lba_to_bytes().map_err(io::Error::other)?;
        let opened = self.device.current();
        let buffer = self.aligned(blocks.len());
        buffer.copy_from_slice(blocks);
        opened.file.write_all_at(buffer, offset.0)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.device.current().file.sync_data()
    }
}

fn open(path: &Path, access: Access) -> io::Result<Opened> {
    let metadata = std::fs::metadata(path)?;
    let is_block = metadata.file_type().is_block_device();
    if !is_block && !metadata.is_file() {
        let what = "neither a block device nor a plain file";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let with = |flags: OFlags| {
        let flags = i32::try_from(flags.bits()).unwrap_or(0);
        OpenOptions::new()
            .read(true)
            .write(access == Access::ReadWrite)
            .custom_flags(flags)
            .open(path)
    };
    let file = match with(OFlags::DIRECT | OFlags::CLOEXEC) {
        Err(error) if !is_block && error.kind() == io::ErrorKind::InvalidInput => {
            tracing::warn!(path = %path.display(), "the file system does not support O_DIRECT: use this volume for a lab only");
            with(OFlags::CLOEXEC)?
        }
        other => other?,
    };
    if access == Access::ReadWrite {
        // This process writes through it too: metadata, and the zeroes of new disks.
        let no_vm = VmUid::from_bytes([0; 16]);
        writer_lock::hold(&file, writer_of(no_vm, std::process::id())?)?;
    }
    Ok(Opened {
        identity: identity(&file.metadata()?),
        file,
        is_block,
    })
}

/// The same inode in a new open file description. By descriptor: the path may name another one by now.
fn reopen(opened: &Opened) -> io::Result<OwnedFd> {
    let own = format!("/proc/self/fd/{}", opened.file.as_raw_fd());
    let flags = rustix::fs::fcntl_getfl(&opened.file)? & (OFlags::DIRECT | OFlags::RWMODE);
    Ok(rustix::fs::open(
        own,
        flags | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

fn identity(metadata: &std::fs::Metadata) -> Identity {
    Identity {
        device: metadata.dev(),
        inode: metadata.ino(),
        special: metadata.rdev(),
    }
}

/// Reads a file of the sysfs directory of the block device.
fn sysfs(opened: &Opened, file: &str) -> Option<String> {
    if !opened.is_block {
        return None;
    }
    let number = opened.identity.special;
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let directory = format!("/sys/dev/block/{major}:{minor}");
    std::fs::read_to_string(format!("{directory}/{file}"))
        // The queue of a partition is in the directory of its disk.
        .or_else(|_| std::fs::read_to_string(format!("{directory}/../{file}")))
        .ok()
}

/// 1 MiB: the size of one write to a device without WRITE ZEROES.
const ZERO_CHUNK_BLOCKS: usize = 256;
