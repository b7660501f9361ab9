//! Writes received frames to guest memory.

use bascule_migrate::wire::{Batch, PAGE, RunContents};
use bascule_migrate::{MemoryLayout, PageIndex, PageRange, Pages};
use vm_memory::{Address, Bytes as _, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::{GuestMemory, PAGE_SIZE};

/// The layout of the memory, as `Config` frames carry it.
pub(super) fn layout_of(memory: &GuestMemory) -> MemoryLayout {
    let ranges = memory
        .iter()
        .filter_map(|region| {
            let first = PageIndex(region.start_addr().raw_value() / PAGE_SIZE);
            PageRange::new(first, Pages(region.len() / PAGE_SIZE)).ok()
        })
        .collect();
    MemoryLayout::new(ranges).expect("guest memory has one or two regions in order")
}

/// Writes batches to memory that was all zero at first.
pub(super) struct Applier<'a> {
    memory: &'a GuestMemory,
    layout: MemoryLayout,
    /// A bit per page of each region that ever got contents: others need no zeroing.
    written: Vec<Vec<u64>>,
}

impl<'a> Applier<'a> {
    pub(super) fn new(memory: &'a GuestMemory) -> Self {
        let layout = layout_of(memory);
        let written = layout
            .ranges()
            .iter()
            .map(|range| {
                let words = range.pages().0.div_ceil(64);
                vec![0; usize::try_from(words).unwrap_or(usize::MAX)]
            })
            .collect();
        Self {
            memory,
            layout,
            written,
        }
    }

    /// Writes one batch, all of whose runs are in the layout.
    pub(super) fn apply(&mut self, batch: &Batch<'_>) -> Result<(), vm_memory::GuestMemoryError> {
        for (run, contents) in batch.runs() {
            match contents {
                RunContents::Data(data) => {
                    self.mark(run);
                    self.memory.write_slice(data, GuestAddress(run.address()))?;
                }
                RunContents::Zero => self.zero(run)?,
            }
        }
        Ok(())
    }

    fn zero(&mut self, run: PageRange) -> Result<(), vm_memory::GuestMemoryError> {
        for page in run.first().0..run.end().0 {
            if self.is_written(PageIndex(page)) {
                let address = GuestAddress(page * PAGE_SIZE);
                self.memory.write_slice(&[0; PAGE], address)?;
            }
        }
        Ok(())
    }

    fn mark(&mut self, run: PageRange) {
        for page in run.first().0..run.end().0 {
            if let Some((region, word, bit)) = self.place(PageIndex(page)) {
                self.written[region][word] |= bit;
            }
        }
    }

    fn is_written(&self, page: PageIndex) -> bool {
        self.place(page)
            .is_some_and(|(region, word, bit)| self.written[region][word] & bit != 0)
    }

    fn place(&self, page: PageIndex) -> Option<(usize, usize, u64)> {
        let inside = |range: &PageRange| range.first() <= page && page < range.end();
        let region = self.layout.ranges().iter().position(inside)?;
        let index = page.0 - self.layout.ranges()[region].first().0;
        let word = usize::try_from(index / 64).ok()?;
        Some((region, word, 1 << (index % 64)))
    }
}
