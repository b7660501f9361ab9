//! Storage behind a small trait: the device in production, memory with faults in tests.

use std::io;

use bascule_types::Lba;

use crate::block::BLOCK_BYTES;

/// A device of 4096-byte blocks.
///
/// # Assumes
/// - One aligned logical block (512 or 4096 bytes) is written atomically.
/// - A write that completed may be lost by a crash until a later [`BlockStore::flush`] completed.
pub trait BlockStore {
    /// Reads whole blocks from `lba` on.
    ///
    /// # Errors
    /// The device's; also when the range does not exist.
    fn read(&mut self, lba: Lba, blocks: &mut [u8]) -> io::Result<()>;

    /// Writes whole blocks from `lba` on.
    ///
    /// # Errors
    /// The device's. Afterwards the content of the range is unknown.
    fn write(&mut self, lba: Lba, blocks: &[u8]) -> io::Result<()>;

    /// Makes every completed write durable.
    ///
    /// # Errors
    /// The device's. Afterwards no earlier write may be trusted, and a second flush proves nothing.
    fn flush(&mut self) -> io::Result<()>;
}

impl<S: BlockStore + ?Sized> BlockStore for &mut S {
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

/// A device in memory. Writes are kept apart until a flush, so that a test can lose any of them.
#[derive(Clone, Debug)]
pub struct MemStore {
    durable: Vec<u8>,
    unflushed: Vec<(Lba, Vec<u8>)>,
    /// How many more writes and flushes succeed; none: all.
    budget: Option<u64>,
}

impl MemStore {
    /// A blank device of `blocks` blocks.
    #[must_use]
    pub fn new(blocks: usize) -> Self {
        Self {
            durable: vec![0; blocks * BLOCK_BYTES],
            unflushed: Vec::new(),
            budget: None,
        }
    }

    /// Fail every write and flush after `count` more.
    pub fn fail_after(&mut self, count: u64) {
        self.budget = Some(count);
    }

    /// The writes that no flush has followed, oldest first.
    #[must_use]
    pub fn unflushed(&self) -> &[(Lba, Vec<u8>)] {
        &self.unflushed
    }

    /// What a crash leaves if exactly the unflushed writes for which `kept` says so reached the
    /// medium. Never fails again.
    #[must_use]
    pub fn crashed(&self, kept: impl Fn(usize) -> bool) -> Self {
        let mut durable = self.durable.clone();
        for (index, (lba, bytes)) in self.unflushed.iter().enumerate() {
            if kept(index) {
                put(&mut durable, *lba, bytes);
            }
        }
        Self {
            durable,
            unflushed: Vec::new(),
            budget: None,
        }
    }

    fn spend(&mut self) -> io::Result<()> {
        match &mut self.budget {
            Some(0) => Err(io::Error::other("injected fault")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn range(&self, lba: Lba, length: usize) -> io::Result<std::ops::Range<usize>> {
        let start = usize::try_from(lba.0)
            .ok()
            .and_then(|lba| lba.checked_mul(BLOCK_BYTES));
        let range = start.and_then(|start| Some(start..start.checked_add(length)?));
        match range {
            Some(range) if range.end <= self.durable.len() => Ok(range),
            _ => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
        }
    }
}

impl BlockStore for MemStore {
    fn read(&mut self, lba: Lba, blocks: &mut [u8]) -> io::Result<()> {
        let range = self.range(lba, blocks.len())?;
        let end = lba.0 + (blocks.len() / BLOCK_BYTES) as u64;
        blocks.copy_from_slice(&self.durable[range]);
        for (at, block) in &self.unflushed {
            if (lba.0..end).contains(&at.0) {
                put(blocks, Lba(at.0 - lba.0), block);
            }
        }
        Ok(())
    }

    fn write(&mut self, lba: Lba, blocks: &[u8]) -> io::Result<()> {
        self.spend()?;
        self.range(lba, blocks.len())?;
        // A crash may keep some blocks of one write and lose others.
        for (index, block) in blocks.chunks(BLOCK_BYTES).enumerate() {
            self.unflushed
                .push((Lba(lba.0 + index as u64), block.to_vec()));
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.spend()?;
        for (lba, bytes) in std::mem::take(&mut self.unflushed) {
            put(&mut self.durable, lba, &bytes);
        }
        Ok(())
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the caller has checked that the range lies in memory"
)]
fn put(device: &mut [u8], lba: Lba, bytes: &[u8]) {
    let start = lba.0 as usize * BLOCK_BYTES;
    device[start..start + bytes.len()].copy_from_slice(bytes);
}
