//! The extent map: where the bytes of a disk lie on its volume.

use std::io;

use bascule_types::{Bytes, ExtentRun};

/// The extent runs of a disk, ordered by their offset on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentMap {
    runs: Vec<Run>,
    size: u64,
}

/// Why extent runs cannot hold a disk.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum ExtentError {
    /// The runs are smaller than the disk.
    #[error("a disk of {size} lies on extents of {found} only")]
    TooShort { size: Bytes, found: Bytes },
    /// The size is not a whole number of sectors, or a run is beyond what 64 bits address.
    #[error("a disk of {size} on such extents is not addressable in sectors of 512 bytes")]
    NotAddressable { size: Bytes },
    /// The runs end in the middle of a block that the disk uses.
    #[error("a disk of {size} ends within a block of {block_bytes} bytes of its device")]
    NotWholeBlocks { size: Bytes, block_bytes: u32 },
    /// The unit of I/O of the file is unknown or not supported.
    #[error("the disk's unit of I/O cannot be used")]
    Geometry {
        #[source]
        source: io::Error,
    },
}

/// A part of a request that is contiguous on the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// The first byte on the volume.
    pub(super) offset: u64,
    /// In bytes.
    pub(super) length: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// The first byte on the disk.
    disk: u64,
    /// The first byte on the volume.
    volume: u64,
    length: u64,
}

impl ExtentMap {
    /// The map of a disk of `size` on `runs`.
    ///
    /// # Errors
    /// [`ExtentError`].
    pub fn new(runs: &[ExtentRun], size: Bytes) -> Result<Self, ExtentError> {
        let not_addressable = || ExtentError::NotAddressable { size };
        let mut disk = 0_u64;
        let mut map = Vec::with_capacity(runs.len());
        for run in runs {
            let volume = run.start.lba_to_bytes().map_err(|_| not_addressable())?.0;
            let length = run.length.0;
            volume.checked_add(length).ok_or_else(not_addressable)?;
            map.push(Run {
                disk,
                volume,
                length,
            });
            disk = disk.checked_add(length).ok_or_else(not_addressable)?;
        }
        if disk < size.0 {
            return Err(ExtentError::TooShort {
                size,
                found: Bytes(disk),
            });
        }
        size.bytes_to_sectors().map_err(|_| not_addressable())?;
        Ok(Self {
            runs: map,
            size: size.0,
        })
    }

    /// The disk's size in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size
    }

    /// The sum of all runs in bytes: at least the size of the disk, in whole extents.
    pub(super) fn reach_bytes(&self) -> u64 {
        self.runs.last().map_or(0, |run| run.disk + run.length)
    }

    /// Splits `length` bytes from `offset` of the disk into pieces that are contiguous on the volume.
    /// They must lie within [`ExtentMap::reach_bytes`].
    pub(super) fn pieces(&self, offset: u64, length: usize) -> Vec<Piece> {
        let mut at = offset;
        let mut left = length;
        let first = self
            .runs
            .partition_point(|run| run.disk + run.length <= offset);
        let mut pieces = Vec::new();
        for run in &self.runs[first..] {
            if left == 0 {
                break;
            }
            let inside = at - run.disk;
            let room = usize::try_from(run.length - inside).unwrap_or(usize::MAX);
            let here = left.min(room);
            pieces.push(Piece {
                offset: run.volume + inside,
                length: here,
            });
            left -= here;
            at = run.disk + run.length;
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use bascule_types::Lba;

    use super::*;

    fn run(start: u64, blocks: u64) -> ExtentRun {
        ExtentRun {
            start: Lba(start),
            length: Bytes(blocks * 4096),
        }
    }

    #[test]
    fn a_request_is_split_where_extents_meet() {
        let map = ExtentMap::new(&[run(100, 2), run(7, 1), run(50, 4)], Bytes(6 * 4096)).unwrap();
        let piece = |offset, length| Piece { offset, length };
        assert_eq!(map.pieces(0, 512), [piece(409_600, 512)]);
        assert_eq!(
            map.pieces(4096, 4096 * 3),
            [
                piece(101 * 4096, 4096),
                piece(7 * 4096, 4096),
                piece(50 * 4096, 4096)
            ]
        );
        assert_eq!(map.pieces(8192, 4096), [piece(7 * 4096, 4096)]);
        assert_eq!(map.pieces(0, 0), []);
    }

    #[test]
    fn runs_that_cannot_hold_the_disk_are_refused() {
        let short = ExtentMap::new(&[run(0, 1)], Bytes(8192)).unwrap_err();
        assert_eq!(
            short.to_string(),
            "a disk of 8192 B lies on extents of 4096 B only"
        );
        assert!(ExtentMap::new(&[run(u64::MAX, 1)], Bytes(512)).is_err());
        assert!(ExtentMap::new(&[run(0, 1)], Bytes(100)).is_err());
    }
}
