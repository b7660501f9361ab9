//! The allocator of the extent region: first fit; where no free run is long enough, the longest runs
//! first, so that a disk gets few runs. Not stored on the volume: rebuilt from the rows.

use std::collections::BTreeMap;

use bascule_types::{Bytes, ExtentRun, Lba, Refusal, Table};

use crate::metadata_records::RUNS_MAX;
use crate::superblock::{RegionKind, Superblock};
use crate::volume_layout::BLOCK_BYTES_U64;

/// The free extents, as runs of extent numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExtentAllocator {
    extent_blocks: u64,
    first: u64,
    total: u64,
    /// First extent of each free run → length in extents. Adjacent runs are merged.
    free: BTreeMap<u64, u64>,
}

impl ExtentAllocator {
    pub(crate) fn new(superblock: &Superblock) -> Self {
        let region = superblock.region(RegionKind::Extents);
        let extent_blocks = superblock.extent_bytes().0 / BLOCK_BYTES_U64;
        let first = region.start.0 / extent_blocks;
        let total = region.blocks / extent_blocks;
        Self {
            extent_blocks,
            first,
            total,
            free: BTreeMap::from([(first, total)]),
        }
    }

    pub(crate) fn capacity(&self) -> Bytes {
        self.extents_to_bytes(self.total)
    }

    pub(crate) const fn extent_bytes(&self) -> u64 {
        self.extent_blocks * BLOCK_BYTES_U64
    }

    pub(crate) fn free_bytes(&self) -> Bytes {
        self.extents_to_bytes(self.free.values().sum())
    }

    /// Chooses runs for `size` bytes, without allocating them.
    pub(crate) fn plan(&self, size: Bytes) -> Result<Vec<ExtentRun>, Refusal> {
        let mut missing = size.0.div_ceil(self.extent_blocks * BLOCK_BYTES_U64);
        let needed = self.extents_to_bytes(missing);
        let free = self.free_bytes();
        if missing > self.free.values().sum() {
            return Err(Refusal::Full { free, needed });
        }
        let mut runs: Vec<(u64, u64)> = self.free.iter().map(|(s, l)| (*s, *l)).collect();
        if let Some(fit) = runs.iter().find(|(_, length)| *length >= missing) {
            runs = vec![*fit];
        } else {
            runs.sort_by_key(|(start, length)| (u64::MAX - length, *start));
        }
        let mut taken = Vec::new();
        for (start, length) in runs {
            if missing == 0 {
                break;
            }
            let count = length.min(missing);
            missing -= count;
            taken.push(self.run(start, count));
        }
        if taken.len() > RUNS_MAX {
            let what = Table::Extents;
            return Err(Refusal::TableFull { what });
        }
        Ok(taken)
    }

    /// Allocates runs. False if any extent was not free: the metadata is damaged.
    pub(crate) fn take(&mut self, runs: &[ExtentRun]) -> bool {
        runs.iter().all(|run| {
            self.extents(run)
                .is_some_and(|(start, length)| self.take_run(start, length))
        })
    }

    /// Frees runs, which must be allocated.
    pub(crate) fn give(&mut self, runs: &[ExtentRun]) {
        for run in runs {
            if let Some((start, length)) = self.extents(run) {
                self.give_run(start, length);
            }
        }
    }

    fn take_run(&mut self, start: u64, length: u64) -> bool {
        let found = self.free.range(..=start).next_back();
        let Some((free_start, free_length)) = found.map(|(s, l)| (*s, *l)) else {
            return false;
        };
        let (end, free_end) = (start + length, free_start + free_length);
        if end > free_end {
            return false;
        }
        self.free.remove(&free_start);
        if free_start < start {
            self.free.insert(free_start, start - free_start);
        }
        if end < free_end {
            self.free.insert(end, free_end - end);
        }
        true
    }

    fn give_run(&mut self, mut start: u64, mut length: u64) {
        let before = self.free.range(..start).next_back();
        if let Some((s, l)) = before.map(|(s, l)| (*s, *l))
            && s + l == start
        {
            self.free.remove(&s);
            (start, length) = (s, l + length);
        }
        if let Some(after) = self.free.remove(&(start + length)) {
            length += after;
        }
        self.free.insert(start, length);
    }

    fn extents(&self, run: &ExtentRun) -> Option<(u64, u64)> {
        let blocks = run.length.0 / BLOCK_BYTES_U64;
        let whole = run.start.0.is_multiple_of(self.extent_blocks)
            && blocks.is_multiple_of(self.extent_blocks)
            && run.length.0.is_multiple_of(BLOCK_BYTES_U64);
        whole.then(|| {
            (
                run.start.0 / self.extent_blocks,
                blocks / self.extent_blocks,
            )
        })
    }

    fn run(&self, start: u64, count: u64) -> ExtentRun {
        ExtentRun {
            start: Lba(start * self.extent_blocks),
            length: self.extents_to_bytes(count),
        }
    }

    const fn extents_to_bytes(&self, extents: u64) -> Bytes {
        Bytes(
            extents
                .saturating_mul(self.extent_blocks)
                .saturating_mul(BLOCK_BYTES_U64),
        )
    }
}
