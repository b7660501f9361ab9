//! Dirty page tracking of guest RAM: writes by vCPUs (KVM's dirty log) and by devices (vm-memory's
//! bitmap).
//!
//! A round of pre-copy is: [`DirtyTracker::fetch`] the pages, then per chunk first
//! [`DirtyTracker::clear`] it, then read and send it. A page written after its chunk was cleared is
//! in the next fetch. Clearing in chunks, just before the read, keeps pages that are written
//! again and again in one round from being sent twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MmapRegion};
use vmm_sys_util::errno;

use crate::ioctl;
use crate::kvm::set_memory_slot;
use crate::memory::{GuestMemory, PAGE_SIZE};

/// Pages per word of a bitmap, and the granularity at which KVM clears.
pub const PAGES_PER_WORD: u64 = 64;

/// A bit per 4 KiB page of guest RAM, by region in the order of [`GuestMemory`]'s iteration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyBitmap {
    regions: Vec<RegionBits>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct RegionBits {
    pages: u64,
    words: Vec<u64>,
}

/// Why the dirty log does not work.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// KVM refused.
    #[error("cannot {action} the dirty log of memory slot {slot}")]
    Kvm {
        /// The step that failed.
        action: &'static str,
        /// The memory slot, which is the index of the region.
        slot: u32,
        /// The kernel's answer.
        #[source]
        source: errno::Error,
    },
    /// A range that is not in guest RAM or not aligned.
    #[error("pages {first_page}.. are not a range of memory region {region}")]
    Range {
        /// Index of the region.
        region: usize,
        /// First page of the range.
        first_page: u64,
    },
}

/// A dirty log that can be switched on and off while the guest runs.
pub trait DirtyTracker: Send + Sync {
    /// Begins to log. Every page counts as dirty until it is cleared.
    ///
    /// # Errors
    /// When KVM refuses; the log is then off.
    fn start(&self) -> Result<(), DirtyError>;

    /// The pages written since they were last cleared. Pages written by devices are returned once: the
    /// caller keeps those that it has not yet sent.
    ///
    /// # Errors
    /// When KVM refuses.
    fn fetch(&self) -> Result<DirtyBitmap, DirtyError>;

    /// Clears the dirty bits of the pages with a bit in `words`. `first_page` is a multiple of
    /// [`PAGES_PER_WORD`] within the region.
    ///
    /// # Errors
    /// When KVM refuses or the range is not in the region.
    fn clear(&self, region: usize, first_page: u64, words: &[u64]) -> Result<(), DirtyError>;

    /// Ends the log.
    ///
    /// # Errors
    /// When KVM refuses: the log stays on and slows the guest.
    fn stop(&self) -> Result<(), DirtyError>;
}

impl DirtyBitmap {
    /// No page is set.
    #[must_use]
    pub fn clean(memory: &GuestMemory) -> Self {
        let regions = memory
            .iter()
            .map(|region| {
                let pages = region.len() / PAGE_SIZE;
                RegionBits {
                    pages,
                    words: vec![0; word_count(pages)],
                }
            })
            .collect();
        Self { regions }
    }

    /// Every page is set.
    #[must_use]
    pub fn full(memory: &GuestMemory) -> Self {
        let mut bitmap = Self::clean(memory);
        for region in &mut bitmap.regions {
            region.words.fill(u64::MAX);
            region.trim();
        }
        bitmap
    }

    /// Number of regions.
    #[must_use]
    pub fn regions(&self) -> usize {
        self.regions.len()
    }

    /// The words of a region: page `64 * i + b` is bit `b` of word `i`.
    #[must_use]
    pub fn words(&self, region: usize) -> &[u64] {
        self.regions.get(region).map_or(&[], |bits| &bits.words)
    }

    /// The words of a region, for clearing bits.
    pub fn words_mut(&mut self, region: usize) -> &mut [u64] {
        self.regions
            .get_mut(region)
            .map_or(&mut [], |bits| &mut bits.words)
    }

    /// How many pages are set.
    #[must_use]
    pub fn count(&self) -> u64 {
        let words = self.regions.iter().flat_map(|region| &region.words);
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// Sets what is set in `other`, a bitmap of the same memory.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.regions.iter_mut().zip(&other.regions) {
            for (word, more) in mine.words.iter_mut().zip(&theirs.words) {
                *word |= more;
            }
        }
    }
}

impl RegionBits {
    /// Bits beyond the last page stay clear, so that counts are right.
    fn trim(&mut self) {
        let used = self.pages % PAGES_PER_WORD;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }
}

/// The log of a guest under KVM. Memory slot `n` is region `n` of its RAM.
#[derive(Debug)]
pub struct KvmDirtyTracker {
    vm: Arc<VmFd>,
    memory: Arc<GuestMemory>,
    /// Fetching and clearing are two steps; without it KVM clears at the fetch.
    manual: bool,
    /// Return every page at the next fetch, because KVM does not.
    all_dirty: AtomicBool,
}

impl KvmDirtyTracker {
    /// A tracker, not yet started. Enables manual protection, with every page initially dirty.
    #[must_use]
    pub fn new(vm: Arc<VmFd>, memory: Arc<GuestMemory>) -> Self {
        let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let flags = wanted & u32::try_from(offered).unwrap_or(0);
        let capability = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            args: [flags.into(), 0, 0, 0],
            ..Default::default()
        };
        let manual =
            flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0 && vm.enable_cap(&capability).is_ok();
        Self {
            vm,
            memory,
            manual,
            all_dirty: AtomicBool::new(false),
        }
    }

    /// All of the RAM was written, in a way that no log sees: every page is in the next fetch.
    pub(crate) fn mark_all(&self) {
        self.all_dirty.store(true, Ordering::SeqCst);
    }

    /// Sets the flags of every memory slot.
    fn set_flags(&self, action: &'static str, flags: u32) -> Result<(), DirtyError> {
        for (slot, region) in (0_u32..).zip(self.memory.iter()) {
            set_memory_slot(&self.vm, slot, region, flags).map_err(|source| DirtyError::Kvm {
                action,
                slot,
                source,
            })?;
        }
        Ok(())
    }
}

impl DirtyTracker for KvmDirtyTracker {
    fn start(&self) -> Result<(), DirtyError> {
        for region in self.memory.iter() {
            MmapRegion::bitmap(region).reset();
        }
        self.all_dirty.store(true, Ordering::SeqCst);
        let started = self.set_flags("start", KVM_MEM_LOG_DIRTY_PAGES);
        if started.is_err() {
            self.set_flags("stop", 0)?;
        }
        started
    }

    fn fetch(&self) -> Result<DirtyBitmap, DirtyError> {
        let mut bitmap = if self.all_dirty.swap(false, Ordering::SeqCst) {
            DirtyBitmap::full(&self.memory)
        } else {
            DirtyBitmap::clean(&self.memory)
        };
        for ((slot, region), bits) in (0_u32..).zip(self.memory.iter()).zip(&mut bitmap.regions) {
            let length = usize::try_from(region.len()).unwrap_or(usize::MAX);
            let by_vcpus =
                self.vm
                    .get_dirty_log(slot, length)
                    .map_err(|source| DirtyError::Kvm {
                        action: "fetch",
                        slot,
                        source,
                    })?;
            let by_devices = MmapRegion::bitmap(region).get_and_reset();
            for ((word, vcpus), devices) in bits.words.iter_mut().zip(by_vcpus).zip(by_devices) {
                *word |= vcpus | devices;
            }
            bits.trim();
        }
        Ok(bitmap)
    }

    fn clear(&self, region: usize, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        if !self.manual {
            return Ok(());
        }
        let range = DirtyError::Range { region, first_page };
        let Some(total) = self.memory.iter().nth(region).map(|r| r.len() / PAGE_SIZE) else {
            return Err(range);
        };
        if !first_page.is_multiple_of(PAGES_PER_WORD) || first_page >= total {
            return Err(range);
        }
        let requested = u64::try_from(words.len())
            .unwrap_or(u64::MAX)
            .saturating_mul(PAGES_PER_WORD);
        let pages = u32::try_from(requested.min(total - first_page));
        let (Ok(slot), Ok(pages)) = (u32::try_from(region), pages) else {
            return Err(range);
        };
        ioctl::clear_dirty_log(&self.vm, slot, first_page, pages, words).map_err(|source| {
            DirtyError::Kvm {
                action: "clear",
                slot,
                source,
            }
        })
    }

    fn stop(&self) -> Result<(), DirtyError> {
        self.set_flags("stop", 0)
    }
}

fn word_count(pages: u64) -> usize {
    usize::try_from(pages.div_ceil(PAGES_PER_WORD)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::BareVm;
    use crate::memory;
    use crate::testing::kvm_or_skip;
    use bascule_types::Bytes;
    use vm_memory::{Bytes as _, GuestAddress};

    fn tracked(size: Bytes) -> (Arc<GuestMemory>, KvmDirtyTracker) {
        let memory = memory::create(size).unwrap();
        let bare = BareVm::create(crate::kvm::open().unwrap(), &memory, 1).unwrap();
        let tracker = KvmDirtyTracker::new(bare.vm, Arc::clone(&memory));
        (memory, tracker)
    }

    fn clear_all(tracker: &KvmDirtyTracker, bitmap: &DirtyBitmap) {
        for region in 0..bitmap.regions() {
            tracker.clear(region, 0, bitmap.words(region)).unwrap();
        }
    }

    #[test]
    fn everything_is_dirty_at_first_and_a_cleared_page_only_once_written() {
        if !kvm_or_skip() {
            return;
        }
        let (memory, tracker) = tracked(Bytes::mib(2817));
        tracker.start().unwrap();
        let first = tracker.fetch().unwrap();
        assert_eq!(first.count(), 2817 * 256);
        clear_all(&tracker, &first);
        assert_eq!(tracker.fetch().unwrap().count(), 0);
        memory.write_obj(1_u8, GuestAddress(0x5123)).unwrap();
        memory.write_obj(1_u8, GuestAddress(0x1_0000_0000)).unwrap();
        let second = tracker.fetch().unwrap();
        assert_eq!(second.count(), 2);
        assert_eq!(second.words(0)[0], 1 << 5);
        assert_eq!(second.words(1)[0], 1);
        assert_eq!(
            tracker.fetch().unwrap().count(),
            0,
            "device writes are handed out once"
        );
        tracker.stop().unwrap();
    }

    #[test]
    fn a_range_outside_of_ram_or_unaligned_is_refused() {
        if !kvm_or_skip() {
            return;
        }
        let (_memory, tracker) = tracked(Bytes::mib(8));
        tracker.start().unwrap();
        for (region, first_page) in [(1, 0), (0, 1), (0, 2048)] {
            let refused = tracker.clear(region, first_page, &[1]);
            assert!(
                matches!(refused, Err(DirtyError::Range { .. })),
                "{refused:?}"
            );
        }
        tracker.clear(0, 2048 - 64, &[u64::MAX]).unwrap();
    }
}
