//! Guest memory in pages: what there is, and runs of it.

use bascule_types::Bytes;

/// The size of a page on the wire and in the dirty log (KVM API, 4.8), whatever backs the memory.
pub const PAGE_BYTES: u64 = 4096;
/// A machine has a low and a high part and perhaps a few hot-plugged ones.
pub const REGIONS_MAX: usize = 16;

/// A count of 4096-byte pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pages(pub u64);

/// A guest physical address in units of 4096-byte pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

/// A run of guest pages, never empty, whose end fits 64 bits even as a byte address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    first: PageIndex,
    pages: Pages,
}

/// The guest's memory as the runs of pages that exist, in ascending order, without overlap.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MemoryLayout {
    ranges: Vec<PageRange>,
}

/// A range or layout that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A run of no pages.
    #[error("a run of no pages")]
    Empty,
    /// A run that ends beyond the 64-bit address space.
    #[error("a run ends beyond the address space")]
    TooFar,
    /// Runs out of order, or overlapping.
    #[error("memory regions overlap or are not in ascending order")]
    Overlap,
    /// More regions than [`REGIONS_MAX`], or none.
    #[error("a machine has 1 to {REGIONS_MAX} memory regions, not {0}")]
    Count(usize),
}

impl Pages {
    /// This many pages in bytes, as much as 64 bits hold.
    #[must_use]
    pub const fn pages_to_bytes(self) -> Bytes {
        Bytes(self.0.saturating_mul(PAGE_BYTES))
    }
}

impl PageRange {
    /// `pages` pages from `first`.
    ///
    /// # Errors
    /// [`LayoutError::Empty`] and [`LayoutError::TooFar`].
    pub const fn new(first: PageIndex, pages: Pages) -> Result<Self, LayoutError> {
        if pages.0 == 0 {
            return Err(LayoutError::Empty);
        }
        match first.0.checked_add(pages.0) {
            Some(end) if end <= u64::MAX / PAGE_BYTES => Ok(Self { first, pages }),
            _ => Err(LayoutError::TooFar),
        }
    }

    /// The index of the first page.
    #[must_use]
    pub const fn first(self) -> PageIndex {
        self.first
    }

    /// The number of pages.
    #[must_use]
    pub const fn pages(self) -> Pages {
        self.pages
    }

    /// The first page behind it.
    #[must_use]
    pub const fn end(self) -> PageIndex {
        PageIndex(self.first.0 + self.pages.0)
    }

    /// The guest physical byte address of its start.
    #[must_use]
    pub const fn address(self) -> u64 {
        self.first.0 * PAGE_BYTES
    }

    /// Its length in bytes.
    #[must_use]
    pub const fn bytes(self) -> Bytes {
        Bytes(self.pages.0 * PAGE_BYTES)
    }
}

impl MemoryLayout {
    /// The layout with these runs.
    ///
    /// # Errors
    /// [`LayoutError`]: too many, none, out of order or overlapping.
    pub fn new(ranges: Vec<PageRange>) -> Result<Self, LayoutError> {
        if ranges.is_empty() || ranges.len() > REGIONS_MAX {
            return Err(LayoutError::Count(ranges.len()));
        }
        if ranges
            .windows(2)
            .any(|pair| pair[0].end() > pair[1].first())
        {
            return Err(LayoutError::Overlap);
        }
        Ok(Self { ranges })
    }

    /// The runs, ascending.
    #[must_use]
    pub fn ranges(&self) -> &[PageRange] {
        &self.ranges
    }

    /// The number of pages in all ranges.
    #[must_use]
    pub fn total(&self) -> Pages {
        Pages(self.ranges.iter().map(|range| range.pages.0).sum())
    }

    /// Whether all of `run` is memory, within one region.
    #[must_use]
    pub fn contains(&self, run: PageRange) -> bool {
        self.ranges
            .iter()
            .any(|range| range.first() <= run.first() && run.end() <= range.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, pages: u64) -> PageRange {
        PageRange::new(PageIndex(first), Pages(pages)).unwrap()
    }

    #[test]
    fn a_run_must_lie_within_one_region() {
        let layout = MemoryLayout::new(vec![range(0, 16), range(32, 16)]).unwrap();
        assert!(layout.contains(range(0, 16)));
        assert!(layout.contains(range(47, 1)));
        assert!(!layout.contains(range(8, 32)), "it spans the hole");
        assert!(!layout.contains(range(48, 1)));
        assert_eq!(layout.total(), Pages(32));
    }

    #[test]
    fn a_run_beyond_the_address_space_is_refused() {
        assert_eq!(
            PageRange::new(PageIndex(u64::MAX / PAGE_BYTES), Pages(1)),
            Err(LayoutError::TooFar)
        );
        assert_eq!(
            PageRange::new(PageIndex(u64::MAX), Pages(u64::MAX)),
            Err(LayoutError::TooFar)
        );
        assert_eq!(
            PageRange::new(PageIndex(0), Pages(0)),
            Err(LayoutError::Empty)
        );
    }

    #[test]
    fn overlapping_regions_are_no_layout() {
        assert_eq!(
            MemoryLayout::new(vec![range(0, 16), range(15, 4)]),
            Err(LayoutError::Overlap)
        );
        assert_eq!(MemoryLayout::new(vec![]), Err(LayoutError::Count(0)));
    }
}
