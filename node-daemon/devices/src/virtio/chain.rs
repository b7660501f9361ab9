//! Descriptor chains: requests of the guest, read once from its memory.
//!
//! # Guarantees
//! A [`Chain`] lies wholly in guest RAM, is bounded in segments and bytes, and its readable part
//! comes before its writable part. The descriptors in guest memory are not read again.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::guest_ram::GuestRam;

/// A contiguous range of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Segment {
    pub start: GuestAddress,
    /// Never 0.
    pub length_bytes: usize,
}

/// A list of ranges of guest memory, read or written in order (scatter-gather list).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segments(Vec<Segment>);

/// One request of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// The index of the first descriptor, which identifies the chain in the used ring.
    pub head: u16,
    /// The device-readable buffers.
    pub readable: Segments,
    /// The device-writable buffers.
    pub writable: Segments,
}

/// A chain that violates virtio 1.2, 2.7.5, or a limit of this implementation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum ChainError {
    /// A descriptor index is not below the table's size.
    #[error("descriptor {index} of a table of {size}")]
    IndexOutOfRange { index: u16, size: u16 },
    /// The chain has more descriptors than its table: it is a loop.
    #[error("descriptor chain {head} has more than {limit} descriptors")]
    TooLong { head: u16, limit: usize },
    /// The chain has more bytes than a device accepts.
    #[error("descriptor chain {head} is longer than {MAX_CHAIN_BYTES} bytes")]
    TooManyBytes { head: u16 },
    /// A buffer or table is not in guest RAM.
    #[error("{length_bytes} bytes at {start:#x} are not guest memory")]
    NotRam { start: u64, length_bytes: u32 },
    /// A readable descriptor follows a writable one (2.7.4.2).
    #[error("readable descriptor after a writable one in chain {head}")]
    ReadableAfterWritable { head: u16 },
    /// An indirect table in an indirect table, with a next descriptor, empty, or of a length that
    /// is not a multiple of 16 (2.7.5.3.1).
    #[error("malformed indirect descriptor in chain {head}")]
    BadIndirect { head: u16 },
}

impl Chain {
    /// Reads the chain that starts at descriptor `head` of the table of `size` descriptors.
    ///
    /// # Errors
    /// [`ChainError`].
    pub fn read(
        ram: &GuestRam,
        table: GuestAddress,
        size: u16,
        head: u16,
    ) -> Result<Self, ChainError> {
        let mut walk = Walk {
            ram,
            chain: Self {
                head,
                readable: Segments::default(),
                writable: Segments::default(),
            },
            bytes: 0,
        };
        if let Some(indirect) = walk.table(table, size, head, false)? {
            let entries = indirect.len() / DESCRIPTOR_BYTES;
            let whole = indirect.len().is_multiple_of(DESCRIPTOR_BYTES);
            let entries = u16::try_from(entries)
                .ok()
                .filter(|&count| count > 0 && whole);
            let entries = entries.ok_or(ChainError::BadIndirect { head })?;
            walk.table(indirect.addr(), entries, 0, true)?;
        }
        Ok(walk.chain)
    }
}

struct Walk<'a> {
    ram: &'a GuestRam,
    chain: Chain,
    bytes: u64,
}

impl Walk<'_> {
    /// Follows a table from `index` on. Returns the indirect descriptor at its end, if there is one.
    fn table(
        &mut self,
        table: GuestAddress,
        size: u16,
        mut index: u16,
        indirect: bool,
    ) -> Result<Option<Descriptor>, ChainError> {
        let head = self.chain.head;
        // A chain without a loop visits each descriptor of its table at most once.
        let limit = usize::from(size).min(MAX_CHAIN_SEGMENTS);
        for _ in 0..limit {
            if index >= size {
                return Err(ChainError::IndexOutOfRange { index, size });
            }
            let offset = u64::from(index) * u64::from(DESCRIPTOR_BYTES);
            let start = table.0.saturating_add(offset);
            let descriptor: Descriptor =
                self.ram
                    .read_obj(GuestAddress(start))
                    .map_err(|_| ChainError::NotRam {
                        start,
                        length_bytes: DESCRIPTOR_BYTES,
                    })?;
            if descriptor.refers_to_indirect_table() {
                if indirect || descriptor.has_next() {
                    return Err(ChainError::BadIndirect { head });
                }
                return Ok(Some(descriptor));
            }
            self.add(&descriptor)?;
            if !descriptor.has_next() {
                return Ok(None);
            }
            index = descriptor.next();
        }
        Err(ChainError::TooLong { head, limit })
    }

    fn add(&mut self, descriptor: &Descriptor) -> Result<(), ChainError> {
        let head = self.chain.head;
        let not_ram = ChainError::NotRam {
            start: descriptor.addr().0,
            length_bytes: descriptor.len(),
        };
        let writable = descriptor.is_write_only();
        if !writable && !self.chain.writable.0.is_empty() {
            return Err(ChainError::ReadableAfterWritable { head });
        }
        // An empty buffer is legal and ignored.
        if descriptor.len() == 0 {
            return Ok(());
        }
        self.bytes += u64::from(descriptor.len());
        if self.bytes > MAX_CHAIN_BYTES {
            return Err(ChainError::TooManyBytes { head });
        }
        let length_bytes = usize::try_from(descriptor.len()).map_err(|_| not_ram)?;
        if !self.ram.check_range(descriptor.addr(), length_bytes) {
            return Err(not_ram);
        }
        let segment = Segment {
            start: descriptor.addr(),
            length_bytes,
        };
        if writable {
            self.chain.writable.0.push(segment);
        } else {
            self.chain.readable.0.push(segment);
        }
        Ok(())
    }
}

impl Segments {
    /// The ranges, in order.
    #[must_use]
    pub fn as_slice(&self) -> &[Segment] {
        &self.0
    }

    /// The sum of the lengths in bytes.
    #[must_use]
    pub fn length_bytes(&self) -> usize {
        self.0.iter().map(|segment| segment.length_bytes).sum()
    }

    /// Splits the first `count` bytes off and returns them, or `None` when there are fewer.
    pub fn take_front(&mut self, count: usize) -> Option<Self> {
        let rest = self.length_bytes().checked_sub(count)?;
        let tail = self.take_back(rest)?;
        Some(std::mem::replace(self, tail))
    }

    /// Splits the last `count` bytes off and returns them, or `None` when there are fewer.
    pub fn take_back(&mut self, count: usize) -> Option<Self> {
        let mut keep = self.length_bytes().checked_sub(count)?;
        let mut kept = Vec::new();
        let mut cut = Vec::new();
        for segment in self.0.drain(..) {
            let here = keep.min(segment.length_bytes);
            keep -= here;
            if here > 0 {
                kept.push(Segment {
                    length_bytes: here,
                    ..segment
                });
            }
            if here < segment.length_bytes {
                cut.push(Segment {
                    start: GuestAddress(segment.start.0 + to_u64(here)),
                    length_bytes: segment.length_bytes - here,
                });
            }
        }
        self.0 = kept;
        Some(Self(cut))
    }

    /// Copies from guest memory until `data` is full or the ranges end. Returns the number of bytes.
    ///
    /// # Panics
    /// Never: the ranges were checked to be guest memory, which never shrinks.
    pub fn read(&self, ram: &GuestRam, data: &mut [u8]) -> usize {
        let mut done = 0;
        for segment in &self.0 {
            let count = segment.length_bytes.min(data.len() - done);
            if count == 0 {
                break;
            }
            let read = ram.read_slice(&mut data[done..done + count], segment.start);
            read.expect("checked to be guest memory");
            done += count;
        }
        done
    }

    /// Copies to guest memory until `data` or the ranges end, and marks the pages dirty.
    /// Returns the number of bytes.
    ///
    /// # Panics
    /// Never, as [`Segments::read`].
    pub fn write(&self, ram: &GuestRam, data: &[u8]) -> usize {
        let mut done = 0;
        for segment in &self.0 {
            let count = segment.length_bytes.min(data.len() - done);
            if count == 0 {
                break;
            }
            let written = ram.write_slice(&data[done..done + count], segment.start);
            written.expect("checked to be guest memory");
            done += count;
        }
        done
    }
}

impl FromIterator<Segment> for Segments {
    fn from_iter<I: IntoIterator<Item = Segment>>(segments: I) -> Self {
        Self(
            segments
                .into_iter()
                .filter(|segment| segment.length_bytes > 0)
                .collect(),
        )
    }
}

fn to_u64(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

const DESCRIPTOR_BYTES: u32 = 16;
/// Linux makes indirect tables of at most the segment limit that a device announces plus header and
/// status; ours announce less than 256. Room for drivers that round up.
const MAX_CHAIN_SEGMENTS: usize = 1024;
/// Limit on the memory that a device allocates for one request: larger than any request of known
/// drivers (Linux: 4 MiB for a disk, 64 KiB and a header for a frame).
const MAX_CHAIN_BYTES: u64 = 32 << 20;

#[cfg(test)]
mod tests;
