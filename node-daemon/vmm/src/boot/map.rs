//! The memory map that is passed to the guest.

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::layout;
use crate::memory::GuestMemory;

/// The type of a range, with the numbers that E820 and PVH share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RangeKind {
    /// Usable memory.
    Ram,
    /// Not memory.
    Reserved,
}

/// One range of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) length: u64,
    pub(super) kind: RangeKind,
}

impl Range {
    /// The number of its kind.
    pub(super) const fn type_number(self) -> u32 {
        match self.kind {
            RangeKind::Ram => 1,
            RangeKind::Reserved => 2,
        }
    }
}

/// End of the RAM that begins at 0.
pub(super) fn low_ram_end(memory: &GuestMemory) -> u64 {
    memory.iter().next().map_or(0, GuestMemoryRegion::len)
}

/// All ranges, in order of address.
pub(super) fn ranges(memory: &GuestMemory) -> Vec<Range> {
    let mut ranges = vec![
        range(0, layout::EBDA_START, RangeKind::Ram),
        range(layout::EBDA_START, layout::HIMEM_START, RangeKind::Reserved),
        range(layout::HIMEM_START, low_ram_end(memory), RangeKind::Ram),
        range(
            layout::ECAM_START,
            layout::ECAM_START + layout::ECAM_BUS_SIZE,
            RangeKind::Reserved,
        ),
    ];
    ranges.extend(memory.iter().skip(1).map(|region| Range {
        start: region.start_addr().raw_value(),
        length: region.len(),
        kind: RangeKind::Ram,
    }));
    ranges
}

const fn range(start: u64, end: u64, kind: RangeKind) -> Range {
    Range {
        start,
        length: end - start,
        kind,
    }
}
