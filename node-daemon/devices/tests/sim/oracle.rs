//! What lies where, and what must stay there: every sector that a guest writes says whose it is, where it belongs
//! on the guest's disk, and by which of the guest's writes it was written.

use std::collections::BTreeMap;

use bascule_types::{Bytes, ExtentRun, Lba};

use crate::device::BLOCK;

/// The contents of one sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) guest: usize,
    /// The sector of the guest's disk.
    pub(crate) sector: u64,
    /// Which of the guest's writes, from 1 on.
    pub(crate) sequence: u64,
}

impl Stamp {
    pub(crate) fn bytes(self) -> Vec<u8> {
        let words = [MAGIC, self.guest as u64, self.sector, self.sequence];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.repeat(SECTOR / bytes.len())
    }

    /// None of a sector that nobody has written.
    pub(crate) fn read(sector: &[u8]) -> Option<Self> {
        if sector.iter().all(|byte| *byte == 0) {
            return None;
        }
        let word = |n: usize| u64::from_le_bytes(sector[n * 8..n * 8 + 8].try_into().unwrap());
        let stamp = Self {
            guest: usize::try_from(word(1)).unwrap(),
            sector: word(2),
            sequence: word(3),
        };
        assert!(
            sector == stamp.bytes(),
            "I3: a torn sector, that begins with {stamp:?}"
        );
        Some(stamp)
    }
}

/// Knows what was acknowledged, by the device's sectors.
#[derive(Debug, Default)]
pub(crate) struct Oracle {
    acknowledged: BTreeMap<u64, u64>,
}

impl Oracle {
    /// I3: no sector goes back behind what was acknowledged; and nobody writes another guest's disk.
    pub(crate) fn landed(&mut self, number: u64, stamp: Option<Stamp>) {
        let acknowledged = self.acknowledged.get(&number).copied().unwrap_or(0);
        let sequence = stamp.map_or(0, |stamp| stamp.sequence);
        assert!(
            sequence >= acknowledged,
            "I3: {stamp:?} replaced the acknowledged write {acknowledged} of sector {number}"
        );
        if let Some(stamp) = stamp {
            let home = device_sector(stamp.guest, stamp.sector);
            assert_eq!(home, number, "{stamp:?} landed elsewhere");
        }
    }

    pub(crate) fn acknowledge(&mut self, stamp: Stamp) {
        let number = device_sector(stamp.guest, stamp.sector);
        let acknowledged = self.acknowledged.entry(number).or_default();
        *acknowledged = stamp.sequence.max(*acknowledged);
    }

    /// The newest acknowledged write of a sector of a guest's disk; 0 if there is none.
    pub(crate) fn acknowledged(&self, guest: usize, sector: u64) -> u64 {
        let number = device_sector(guest, sector);
        self.acknowledged.get(&number).copied().unwrap_or(0)
    }
}

/// The extents of a guest's disk: two, apart.
pub(crate) fn extents(guest: usize) -> [ExtentRun; 2] {
    let run = |start: u64| ExtentRun {
        start: Lba(start + guest as u64 * RUN_BLOCKS),
        length: Bytes(RUN_BLOCKS * BLOCK),
    };
    [run(SECOND), run(FIRST)]
}

/// Where a sector of a guest's disk lies.
pub(crate) fn device_sector(guest: usize, sector: u64) -> u64 {
    let (block, within) = (sector / BLOCK_SECTORS, sector % BLOCK_SECTORS);
    let run = extents(guest)[usize::try_from(block / RUN_BLOCKS).unwrap()];
    (run.start.0 + block % RUN_BLOCKS) * BLOCK_SECTORS + within
}

pub(crate) const SECTOR: usize = 512;
pub(crate) const BLOCK_SECTORS: u64 = 8;
/// Of one run.
const RUN_BLOCKS: u64 = 4;
/// Of a guest's disk.
pub(crate) const DISK_SECTORS: u64 = 2 * RUN_BLOCKS * BLOCK_SECTORS;
/// Block 0 tells whether the device is there.
const FIRST: u64 = 8;
const SECOND: u64 = 64;
const MAGIC: u64 = 0x6469_736b_2121_2121;
