//! The numbered, checksummed blocks of the disk check.
//!
//! Block number `seq` lies in slot `seq % slots`, so the newest `slots` blocks are on the disk at
//! any time, and a disk that lost an acknowledged write shows a hole or an old number. `boot` names
//! the run of the guest that wrote the block: two guests on one disk show up as two boots whose
//! numbers interleave.
//!
//! | offset | bytes | what                                             |
//! |--------|-------|--------------------------------------------------|
//! | 0      | 8     | magic `BSCPROBE`                                 |
//! | 8      | 8     | `seq`, from 1                                    |
//! | 16     | 8     | `boot`                                           |
//! | 24     | 4064  | filler made from `seq` and `boot`                |
//! | 4088   | 8     | checksum over the 4088 bytes before it           |
//!
//! All numbers are little-endian.

use crate::pattern::mix;

/// The size of a block.
pub const BLOCK_BYTES: usize = 4096;

/// Header of a valid block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Its number, from 1.
    pub seq: u64,
    /// The run of the guest that wrote it.
    pub boot: u64,
}

/// Reason why a block is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockFault {
    /// All zeroes: never written.
    Empty,
    /// Neither zeroes nor a block.
    Foreign,
    /// A block whose checksum does not fit: torn or damaged.
    Torn,
}

impl Block {
    /// Writes this block to `bytes`.
    pub fn encode(self, bytes: &mut [u8; BLOCK_BYTES]) {
        let (body, sum) = bytes.split_at_mut(SUM_OFFSET);
        for (index, word) in body.chunks_exact_mut(8).enumerate() {
            let value = match index {
                0 => MAGIC,
                1 => self.seq,
                2 => self.boot,
                _ => mix(self.seq ^ self.boot.rotate_left(32)).wrapping_add(index as u64),
            };
            word.copy_from_slice(&value.to_le_bytes());
        }
        sum.copy_from_slice(&checksum(body).to_le_bytes());
    }

    /// Reads a block.
    ///
    /// # Errors
    /// [`BlockFault`] when `bytes` hold none.
    pub fn decode(bytes: &[u8; BLOCK_BYTES]) -> Result<Self, BlockFault> {
        if word(bytes, 0) != MAGIC {
            let empty = bytes.iter().all(|&byte| byte == 0);
            return Err(if empty {
                BlockFault::Empty
            } else {
                BlockFault::Foreign
            });
        }
        if word(bytes, SUM_OFFSET) == checksum(&bytes[..SUM_OFFSET]) {
            Ok(Self {
                seq: word(bytes, 8),
                boot: word(bytes, 16),
            })
        } else {
            Err(BlockFault::Torn)
        }
    }
}

/// Result of a scan of all slots of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// The highest number found; 0 when there is none.
    pub last: u64,
    /// The boot that wrote it.
    pub last_boot: u64,
    /// The smallest number found; 0 when there is none.
    pub first: u64,
    /// Slots that hold a valid block of theirs.
    pub valid: u64,
    /// Slots that hold something else than a valid block of theirs or zeroes.
    pub damaged: u64,
    /// The last of these.
    pub damaged_slot: u64,
}

impl Survey {
    /// Adds slot `slot` of `slots` to the result.
    pub fn add(&mut self, slot: u64, slots: u64, found: Result<Block, BlockFault>) {
        match found {
            Ok(block) if block.seq % slots == slot => {
                self.valid += 1;
                if self.first == 0 || block.seq < self.first {
                    self.first = block.seq;
                }
                if block.seq > self.last {
                    self.last = block.seq;
                    self.last_boot = block.boot;
                }
            }
            Err(BlockFault::Empty) => {}
            Ok(_) | Err(BlockFault::Torn | BlockFault::Foreign) => {
                self.damaged += 1;
                self.damaged_slot = slot;
            }
        }
    }

    /// Number of faults that the scan found: damaged slots, and blocks up to [`Self::last`] that are
    /// missing or stale. The guest writes and flushes one block at a time, so the one slot that a
    /// crash may leave torn is the one after the last, which is not a fault.
    #[must_use]
    pub fn faults(&self, slots: u64) -> u64 {
        let torn_in_flight = self.damaged == 1 && self.damaged_slot == (self.last + 1) % slots;
        let excused = u64::from(torn_in_flight);
        let expected = self.last.min(slots - excused);
        let stale = u64::from(self.first + slots <= self.last);
        let damaged = self.damaged - excused;
        damaged + expected.saturating_sub(self.valid + damaged) + stale
    }
}

fn checksum(body: &[u8]) -> u64 {
    body.chunks_exact(8).fold(MAGIC, |sum, word| {
        let mut value = [0; 8];
        value.copy_from_slice(word);
        (sum ^ u64::from_le_bytes(value))
            .rotate_left(5)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
    })
}

fn word(bytes: &[u8; BLOCK_BYTES], offset: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_le_bytes(value)
}

const MAGIC: u64 = u64::from_le_bytes(*b"BSCPROBE");
const SUM_OFFSET: usize = BLOCK_BYTES - 8;

#[cfg(test)]
mod tests {
    use super::*;

    const SLOTS: u64 = 4;

    fn disk_after(writes: impl Iterator<Item = Block>) -> Vec<[u8; BLOCK_BYTES]> {
        let mut disk = vec![[0; BLOCK_BYTES]; 4];
        for block in writes {
            block.encode(&mut disk[(block.seq % SLOTS) as usize]);
        }
        disk
    }

    fn survey(disk: &[[u8; BLOCK_BYTES]]) -> Survey {
        let mut survey = Survey::default();
        for (slot, bytes) in disk.iter().enumerate() {
            survey.add(slot as u64, SLOTS, Block::decode(bytes));
        }
        survey
    }

    #[test]
    fn a_block_reads_back_and_any_flipped_bit_is_noticed() {
        let mut bytes = [0; BLOCK_BYTES];
        let block = Block { seq: 7, boot: 99 };
        block.encode(&mut bytes);
        assert_eq!(Block::decode(&bytes), Ok(block));
        for offset in [8, 16, 24, 2048, 4087, 4088, 4095] {
            let mut flipped = bytes;
            flipped[offset] ^= 1;
            assert_eq!(
                Block::decode(&flipped),
                Err(BlockFault::Torn),
                "offset {offset}"
            );
        }
        assert_eq!(Block::decode(&[0; BLOCK_BYTES]), Err(BlockFault::Empty));
        assert_eq!(Block::decode(&[1; BLOCK_BYTES]), Err(BlockFault::Foreign));
    }

    #[test]
    fn a_full_ring_has_no_fault() {
        let found = survey(&disk_after((1..=10).map(|seq| Block { seq, boot: 1 })));
        assert_eq!((found.last, found.first, found.valid), (10, 7, SLOTS));
        assert_eq!(found.faults(SLOTS), 0);
    }

    #[test]
    fn a_lost_write_leaves_its_slot_empty_or_stale() {
        let early = (1..=3)
            .filter(|&seq| seq != 2)
            .map(|seq| Block { seq, boot: 1 });
        assert_eq!(survey(&disk_after(early)).faults(SLOTS), 1);
        let late = (1..=10)
            .filter(|&seq| seq != 9)
            .map(|seq| Block { seq, boot: 1 });
        assert_eq!(survey(&disk_after(late)).faults(SLOTS), 1);
    }

    #[test]
    fn only_the_block_in_flight_may_be_torn() {
        for (slot, faults) in [(11 % SLOTS, 0), (9 % SLOTS, 1)] {
            let mut disk = disk_after((1..=10).map(|seq| Block { seq, boot: 1 }));
            disk[usize::try_from(slot).unwrap()][100] ^= 1;
            let found = survey(&disk);
            assert_eq!(found.faults(SLOTS), faults, "slot {slot}: {found:?}");
        }
    }

    #[test]
    fn a_block_in_another_slot_counts_as_damage() {
        let mut disk = disk_after((1..=4).map(|seq| Block { seq, boot: 1 }));
        disk.swap(1, 2);
        assert_eq!(survey(&disk).faults(SLOTS), 2);
    }
}
