//! The shared mapping of the page's file: 512 atomic 64-bit words.
#![expect(
    unsafe_code,
    reason = "maps shared memory; the only module of this crate that does"
)]

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::layout::PAGE_BYTES;

/// One page of shared memory, as atomic words.
#[derive(Debug)]
pub(crate) struct Page {
    start: NonNull<u8>,
}

// SAFETY: the mapping is not tied to a thread, and all access goes through atomics.
unsafe impl Send for Page {}
// SAFETY: as above; shared references only load and store atomically.
unsafe impl Sync for Page {}

impl Page {
    /// Maps the first page of `file`.
    ///
    /// # Assumes
    /// The file has at least [`PAGE_BYTES`] bytes and is not truncated while it is mapped: an access
    /// would raise SIGBUS. Only root may write in the run directory, and Bascule truncates no page.
    pub(crate) fn map(file: impl AsFd, writable: bool) -> Result<Self, Errno> {
        let protection = if writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        // SAFETY: a null address lets the kernel choose one, so that no existing mapping is
        // replaced; length and offset are page-aligned.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                PAGE_BYTES,
                protection,
                MapFlags::SHARED,
                file,
                0,
            )
        }?;
        NonNull::new(start.cast())
            .map(|start| Self { start })
            .ok_or(Errno::FAULT)
    }

    /// The word at byte `offset`.
    ///
    /// # Panics
    /// When `offset` is not a multiple of 8 within the page.
    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= PAGE_BYTES);
        // SAFETY: the assertion above keeps the result within the mapping.
        let word = unsafe { self.start.add(offset) };
        // SAFETY: the pointer is within a live mapping (unmapped only by drop, which `&self`
        // excludes), aligned to 8 because pages and the offset are, and every process accesses
        // these words by atomic instructions only.
        unsafe { AtomicU64::from_ptr(word.as_ptr().cast()) }
    }

    /// Loads the word at byte `offset`.
    pub(crate) fn load(&self, offset: usize) -> u64 {
        self.word(offset).load(Ordering::SeqCst)
    }

    /// Stores the word at byte `offset`. The mapping must be writable.
    pub(crate) fn store(&self, offset: usize, value: u64) {
        self.word(offset).store(value, Ordering::SeqCst);
    }

    /// Raises the word at byte `offset` to `value` if it is lower.
    pub(crate) fn raise(&self, offset: usize, value: u64) {
        self.word(offset).fetch_max(value, Ordering::SeqCst);
    }

    /// Adds to the word at byte `offset`.
    pub(crate) fn add(&self, offset: usize, value: u64) {
        self.word(offset).fetch_add(value, Ordering::SeqCst);
    }

    /// Subtracts from the word at byte `offset`.
    pub(crate) fn subtract(&self, offset: usize, value: u64) {
        self.word(offset).fetch_sub(value, Ordering::SeqCst);
    }

    /// Loads 16 bytes as two words; not atomic as a whole.
    pub(crate) fn load_16(&self, offset: usize) -> [u8; 16] {
        let (low, high) = (self.load(offset), self.load(offset + 8));
        (u128::from(low) | u128::from(high) << 64).to_le_bytes()
    }

    /// Stores 16 bytes as two words; not atomic as a whole.
    pub(crate) fn store_16(&self, offset: usize, bytes: [u8; 16]) {
        let [low, high] = split(u128::from_le_bytes(bytes));
        self.store(offset, low);
        self.store(offset + 8, high);
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length and nothing refers to it any
        // more: `word` lends for the life of `&self` only.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), PAGE_BYTES) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "splits a value into its halves"
)]
fn split(value: u128) -> [u64; 2] {
    [value as u64, (value >> 64) as u64]
}
