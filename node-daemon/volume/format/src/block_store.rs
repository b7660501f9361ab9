//! The block device as a trait: a real device in production, memory with injected faults in tests.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use bascule_types::Lba;

use crate::envelope::BLOCK_BYTES;

/// A device of 4096-byte blocks.
///
/// # Assumes
/// - One aligned logical block (512 or 4096 bytes) is written atomically.
/// - A write that completed may be lost by a crash until a later [`BlockStore::flush`] completed.
pub trait BlockStore {
    /// The size of the device in whole blocks, as it is now.
    ///
    /// # Errors
    /// The device's.
    fn blocks(&mut self) -> io::Result<u64>;

    /// Reads whole blocks from `lba` on.
    ///
    /// # Errors
    /// The device's; `UnexpectedEof` for a range beyond its end.
    fn read(&mut self, lba: Lba, blocks: &mut [u8]) -> io::Result<()>;

    /// Writes whole blocks from `lba` on.
    ///
    /// # Errors
    /// The device's. The content of the range is then unknown, and the write may still land later.
    fn write(&mut self, lba: Lba, blocks: &[u8]) -> io::Result<()>;

    /// Makes every completed write durable.
    ///
    /// # Errors
    /// The device's. No earlier write may be relied on then, and a second flush proves nothing.
    fn flush(&mut self) -> io::Result<()>;
}

impl<S: BlockStore + ?Sized> BlockStore for &mut S {
    fn blocks(&mut self) -> io::Result<u64> {
        (**self).blocks()
    }

    fn read(&mut self, lba: Lba, blocks: &mut [u8]) -> io::Result<()> {
        (**self).read(lba, blocks)
    }

    fn write(&mut self, lba: Lba, blocks: &[u8]) -> io::Result<()> {
        (**self).write(lba, blocks)
    }

    fn flush(&mut self) -> io::Result<()> {
        (**self).flush()
    }
}

/// A device in memory for tests. It keeps unflushed writes separately, so that a simulated power loss
/// can lose any subset of them; and the writes that it reported as failed, so that they can land late.
#[derive(Clone, Debug)]
pub struct MemStore {
    size: u64,
    /// Blocks that are missing here are zero. Shared between clones, because a test makes many.
    durable: BTreeMap<Lba, Arc<[u8]>>,
    unflushed: Vec<(Lba, Arc<[u8]>)>,
    /// Blocks of writes that were reported as failed, oldest first.
    failed: Vec<(Lba, Arc<[u8]>)>,
    /// How many more writes and flushes succeed before one fails; `None` means that none fails.
    fail_once: Option<u64>,
    /// How many more writes and flushes succeed; `None` means all.
    budget: Option<u64>,
}

impl MemStore {
    /// A blank device of `blocks` blocks.
    #[must_use]
    pub const fn new(blocks: u64) -> Self {
        Self {
            size: blocks,
            durable: BTreeMap::new(),
            unflushed: Vec::new(),
            failed: Vec::new(),
            fail_once: None,
            budget: None,
        }
    }

    /// Gives the device another size, as the administrator of its storage may.
    pub const fn resize(&mut self, blocks: u64) {
        self.size = blocks;
    }

    /// Makes one write or flush fail, after `count` more; the following ones succeed again.
    pub const fn fail_once(&mut self, count: u64) {
        self.fail_once = Some(count);
    }

    /// Makes every write and flush fail after `count` more.
    pub const fn fail_after(&mut self, count: u64) {
        self.budget = Some(count);
    }

    /// The blocks that were written since the last flush, oldest first.
    #[must_use]
    pub fn unflushed(&self) -> &[(Lba, Arc<[u8]>)] {
        &self.unflushed
    }

    /// The blocks of all failed writes that have not landed, oldest first. As long as the initiator
    /// lives, each may still land.
    #[must_use]
    pub fn failed(&self) -> &[(Lba, Arc<[u8]>)] {
        &self.failed
    }

    /// Lets those failed blocks land for whose index in [`MemStore::failed`] `landed` is true: after
    /// every earlier write to the same address, and not yet flushed. The others never land.
    pub fn land_failed(&mut self, landed: impl Fn(usize) -> bool) {
        let failed = std::mem::take(&mut self.failed).into_iter().enumerate();
        self.unflushed.extend(
            failed
                .filter(|(index, _)| landed(*index))
                .map(|(_, written)| written),
        );
    }

    /// The device after a power loss that kept exactly those unflushed blocks for whose index `kept`
    /// is true. The returned device injects no faults.
    #[must_use]
    pub fn crashed(&self, kept: impl Fn(usize) -> bool) -> Self {
        let mut durable = self.durable.clone();
        let survivors = self.unflushed.iter().enumerate();
        durable.extend(
            survivors
                .filter(|(index, _)| kept(*index))
                .map(|(_, written)| written.clone()),
        );
        Self {
            size: self.size,
            durable,
            unflushed: Vec::new(),
            failed: Vec::new(),
            fail_once: None,
            budget: None,
        }
    }

    fn spend(&mut self) -> io::Result<()> {
        match &mut self.fail_once {
            Some(0) => {
                self.fail_once = None;
                return Err(io::Error::other("injected fault"));
            }
            Some(left) => *left -= 1,
            None => {}
        }
        match &mut self.budget {
            Some(0) => Err(io::Error::other("injected fault")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn check_range(&self, lba: Lba, length: usize) -> io::Result<()> {
        let end = lba.0.checked_add((length / BLOCK_BYTES) as u64);
        if end.is_some_and(|end| end <= self.size) {
            Ok(())
        } else {
            Err(io::Error::from(io::ErrorKind::UnexpectedEof))
        }
    }
}

impl BlockStore for MemStore {
    fn blocks(&mut self) -> io::Result<u64> {
        Ok(self.size)
    }

    fn read(&mut self, lba: Lba, blocks: &mut [u8]) -> io::Result<()> {
        self.check_range(lba, blocks.len())?;
        for (at, block) in (lba.0..).map(Lba).zip(blocks.chunks_mut(BLOCK_BYTES)) {
            let written = self.unflushed.iter().rev().find(|(lba, _)| *lba == at);
            match written
                .map(|(_, bytes)| bytes)
                .or_else(|| self.durable.get(&at))
            {
                Some(bytes) => block.copy_from_slice(bytes),
                None => block.fill(0),
            }
        }
        Ok(())
    }

    fn write(&mut self, lba: Lba, blocks: &[u8]) -> io::Result<()> {
        self.check_range(lba, blocks.len())?;
        // A power loss may keep some blocks of one write and lose others.
        let blocks = blocks.chunks(BLOCK_BYTES).map(Arc::from);
        let blocks = (lba.0..).map(Lba).zip(blocks);
        match self.spend() {
            Ok(()) => self.unflushed.extend(blocks),
            Err(error) => {
                self.failed.extend(blocks);
                return Err(error);
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.spend()?;
        self.durable.extend(self.unflushed.drain(..));
        Ok(())
    }
}
