//! The memory in which this guest builds queues and buffers: nothing of its own is there.

use super::access;
use super::random::Random;

/// The playground, and where RAM ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Playground {
    ram_end: u64,
}

impl Playground {
    /// That of a machine whose RAM below 4 GiB ends at `ram_end`, which is at least 32 MiB.
    pub(super) const fn new(ram_end: u64) -> Self {
        Self { ram_end }
    }

    /// The four pages of a queue's rings: descriptors, available ring, used ring, an indirect table.
    pub(super) const fn rings(slot: u64) -> [u64; 4] {
        let start = RINGS_START + slot % RING_SLOTS * 4 * PAGE_BYTES;
        [
            start,
            start + PAGE_BYTES,
            start + 2 * PAGE_BYTES,
            start + 3 * PAGE_BYTES,
        ]
    }

    /// The end of what [`Self::rings`] returns.
    pub(super) const RINGS_END: u64 = RINGS_START + RING_SLOTS * 4 * PAGE_BYTES;

    /// A place for the contents of one request, of at most a page.
    pub(super) const fn content(random: &mut Random) -> u64 {
        CONTENT_START + random.below(CONTENT_BYTES - PAGE_BYTES)
    }

    /// Where the console's input buffer `index` is, of a page.
    pub(super) const fn inbox(index: u64) -> u64 {
        INBOX_START + index * PAGE_BYTES
    }

    /// A buffer of guest memory: its address and length in bytes. One to be written to is within the playground, but
    /// once in a while among the rings.
    pub(super) fn buffer(self, random: &mut Random, writable: bool) -> (u64, u64) {
        let length = match random.below(32) {
            0 => 0,
            1 => 1 + random.below(600),
            2 => 4096 * random.below(64),
            3 => 512 * random.below(DATA_BYTES / 1024),
            4..10 => 4096,
            _ => 512 * (1 + random.below(8)),
        };
        let unaligned = if random.chance(4) {
            random.below(512)
        } else {
            0
        };
        let within = DATA_START + 512 * random.below((DATA_BYTES - length) / 512 - 1) + unaligned;
        let start = match random.below(100) {
            0 => RINGS_START + random.below(Self::RINGS_END - RINGS_START),
            1..8 if !writable => self.ram_end - length,
            8..16 if !writable => random.below(self.ram_end - length),
            16 => self.ram_end - length - PAGE_BYTES * random.below(4),
            _ => within,
        };
        (start.min(self.ram_end - length), length)
    }

    /// An address that no buffer and no ring should have.
    pub(super) fn wrong_address(self, random: &mut Random) -> u64 {
        match random.below(8) {
            0 => self.ram_end,
            1 => self.ram_end - random.below(64),
            2 => DATA_START | random.below(16),
            3 => MMIO_START + random.below(MMIO_BYTES),
            4 => u64::MAX - random.below(8192),
            5 => 1 << (32 + random.below(32)),
            _ => random.value(),
        }
    }

    /// Writes numbers that parsers dislike over a bit of the rings.
    pub(super) fn scribble(random: &mut Random) {
        let at = RINGS_START + random.below(Self::RINGS_END - RINGS_START - 64);
        for offset in 0..random.below(8) {
            access::write(at + 8 * offset, 8, random.value());
        }
    }
}

const PAGE_BYTES: u64 = 4096;
/// Above the image and the firmware's tables.
const RINGS_START: u64 = 16 << 20;
const RING_SLOTS: u64 = 64;
const CONTENT_START: u64 = 18 << 20;
const CONTENT_BYTES: u64 = 1 << 20;
const INBOX_START: u64 = 19 << 20;
const DATA_START: u64 = 20 << 20;
const DATA_BYTES: u64 = 8 << 20;
/// The holes below 4 GiB of a small guest, in which devices are.
pub(super) const MMIO_START: u64 = 0xb000_0000;
pub(super) const MMIO_BYTES: u64 = (4 << 30) - MMIO_START;
