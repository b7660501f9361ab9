//! Reads guest memory into frames.

use std::io;
use std::sync::Arc;

use bascule_migrate::wire::{BatchBuilder, PAGE};
use bascule_migrate::{PageIndex, PageRange, Pages};
use vm_memory::{
    Address, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
    bitmap::AtomicBitmap,
};

use crate::dirty::{DirtyBitmap, DirtyError, DirtyTracker, PAGES_PER_WORD};
use crate::memory::{GuestMemory, PAGE_SIZE};

/// Words of the dirty bitmap that are cleared at once: 16 MiB of memory. Small enough that a page
/// that is written again and again is sent once a round, large enough to make the call cheap.
const CHUNK_WORDS: usize = 64;
const ZERO_PAGE: [u8; PAGE] = [0; PAGE];

/// Where full batches are sent.
pub(super) trait Sink {
    /// Sends the batch and leaves it empty.
    fn take(&mut self, batch: &mut BatchBuilder) -> io::Result<()>;
}

/// The pages of one pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Passed {
    /// Pages sent with their contents.
    pub(super) data: Pages,
    /// Pages sent as zero, or not at all because they never had contents.
    pub(super) zero: Pages,
}

/// Why a pass failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CopyError {
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    #[error("the memory could not be sent")]
    Sink(#[source] io::Error),
    #[error("guest memory could not be read")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// A run of words of one region's bitmap.
struct Chunk<'a> {
    region: &'a GuestRegionMmap<AtomicBitmap>,
    first_page: u64,
    words: &'a [u64],
    holes: Holes,
}

/// Copies what is set in bitmaps. Reused pass after pass.
pub(super) struct Copier {
    memory: Arc<GuestMemory>,
    batch: BatchBuilder,
    page: Box<[u8; PAGE]>,
}

impl Copier {
    pub(super) fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            memory,
            batch: BatchBuilder::new(),
            page: Box::new(ZERO_PAGE),
        }
    }

    /// Sends every page in `pending`. While the guest runs, each chunk is cleared in `tracker` right
    /// before it is read. `fresh` means that the other side has no memory yet: pages that never had
    /// contents are then left out.
    pub(super) fn pass(
        &mut self,
        pending: &DirtyBitmap,
        tracker: Option<&dyn DirtyTracker>,
        fresh: bool,
        sink: &mut dyn Sink,
    ) -> Result<Passed, CopyError> {
        let mut passed = Passed::default();
        let memory = Arc::clone(&self.memory);
        for (index, region) in memory.iter().enumerate() {
            let words = pending.words(index);
            for (chunk, words) in (0_u64..).zip(words.chunks(CHUNK_WORDS)) {
                if words.iter().all(|word| *word == 0) {
                    continue;
                }
                let first_page = chunk * (CHUNK_WORDS as u64) * PAGES_PER_WORD;
                if let Some(tracker) = tracker {
                    tracker.clear(index, first_page, words)?;
                }
                // Looked up after the clear: a page that gets its first contents later is dirty again.
                let holes = if fresh {
                    Holes::find(region, first_page)
                } else {
                    Holes::unknown()
                };
                let chunk = Chunk {
                    region,
                    first_page,
                    words,
                    holes,
                };
                self.chunk(chunk, sink, &mut passed)?;
            }
        }
        self.flush(sink)?;
        Ok(passed)
    }

    fn chunk(
        &mut self,
        chunk: Chunk<'_>,
        sink: &mut dyn Sink,
        passed: &mut Passed,
    ) -> Result<(), CopyError> {
        let Chunk {
            region,
            first_page,
            words,
            mut holes,
        } = chunk;
        let start = region.start_addr().raw_value() / PAGE_SIZE;
        for (word_index, &word) in (0_u64..).zip(words) {
            let mut rest = word;
            while rest != 0 {
                let bit = u64::from(rest.trailing_zeros());
                rest &= rest - 1;
                let page = first_page + word_index * PAGES_PER_WORD + bit;
                if holes.has(region, page) {
                    passed.zero.0 += 1;
                    continue;
                }
                let address = MemoryRegionAddress(page * PAGE_SIZE);
                region
                    .get_slice(address, PAGE)?
                    .copy_to(self.page.as_mut_slice());
                if *self.page == ZERO_PAGE {
                    passed.zero.0 += 1;
                    self.push_zero(PageIndex(start + page), sink)?;
                } else {
                    passed.data.0 += 1;
                    self.push_page(PageIndex(start + page), sink)?;
                }
            }
        }
        Ok(())
    }

    fn push_zero(&mut self, page: PageIndex, sink: &mut dyn Sink) -> Result<(), CopyError> {
        let Ok(range) = PageRange::new(page, Pages(1)) else {
            return Ok(());
        };
        while !self.batch.push_zero(range) {
            self.flush(sink)?;
        }
        Ok(())
    }

    fn push_page(&mut self, page: PageIndex, sink: &mut dyn Sink) -> Result<(), CopyError> {
        let contents = &self.page;
        while !self
            .batch
            .push_page(page, |place| place.copy_from_slice(contents.as_slice()))
        {
            sink.take(&mut self.batch).map_err(CopyError::Sink)?;
        }
        Ok(())
    }

    fn flush(&mut self, sink: &mut dyn Sink) -> Result<(), CopyError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        sink.take(&mut self.batch).map_err(CopyError::Sink)
    }
}

/// Finds the pages of a memory file that were never written. Queried run by run, in ascending order.
struct Holes {
    /// Pages below this are known to have contents or not, by `hole`.
    known_end: u64,
    hole: bool,
}

impl Holes {
    /// Every page may have contents.
    const fn unknown() -> Self {
        Self {
            known_end: u64::MAX,
            hole: false,
        }
    }

    fn find(region: &GuestRegionMmap<AtomicBitmap>, page: u64) -> Self {
        let mut holes = Self {
            known_end: page,
            hole: false,
        };
        holes.look(region, page);
        holes
    }

    fn has(&mut self, region: &GuestRegionMmap<AtomicBitmap>, page: u64) -> bool {
        if page >= self.known_end {
            self.look(region, page);
        }
        self.hole
    }

    fn look(&mut self, region: &GuestRegionMmap<AtomicBitmap>, page: u64) {
        use rustix::fs::{SeekFrom, seek};
        let Some(backing) = region.file_offset() else {
            *self = Self::unknown();
            return;
        };
        let at = backing.start() + page * PAGE_SIZE;
        let end = backing.start() + region.len();
        let in_page = |offset: u64| (offset.min(end) - backing.start()) / PAGE_SIZE;
        *self = match seek(backing.file(), SeekFrom::Data(at)) {
            Ok(data) if data > at => Self {
                known_end: in_page(data),
                hole: true,
            },
            Ok(_) => Self {
                known_end: seek(backing.file(), SeekFrom::Hole(at))
                    .map_or_else(|_| in_page(end), in_page),
                hole: false,
            },
            // No contents from here to the end of the file.
            Err(rustix::io::Errno::NXIO) => Self {
                known_end: in_page(end),
                hole: true,
            },
            Err(_) => Self::unknown(),
        };
    }
}
