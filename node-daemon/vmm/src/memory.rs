//! Guest RAM: one anonymous memory file, mapped in one or two regions around the hole below 4 GiB.
//!
//! Writes that go through [`GuestMemory`] set a bit per page in its bitmap. Writes by vCPUs do not:
//! KVM keeps its own log. `dirty` merges the two. Devices that let the kernel write (a read
//! by io_uring) mark the pages themselves.

use std::fs::File;
use std::sync::Arc;

use bascule_types::Bytes;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::layout;

/// The guest's RAM.
pub type GuestMemory = GuestMemoryMmap<AtomicBitmap>;

/// Unit in which RAM is tracked, sent and saved, in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// Least RAM of a guest: the boot structures and a small kernel.
pub const RAM_MIN: Bytes = Bytes::mib(8);
/// Most RAM of a guest: what 46 address bits hold with room to spare.
pub const RAM_MAX: Bytes = Bytes::gib(16 * 1024);

/// Why guest RAM cannot be created.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum MemoryError {
    /// The size is not possible.
    #[error("memory: {size} is not between {RAM_MIN} and {RAM_MAX} in whole MiB")]
    Size { size: Bytes },
    /// The kernel has no memory file for it.
    #[error("cannot create a memory file of {size}")]
    Create {
        size: Bytes,
        /// The kernel's answer.
        #[source]
        source: rustix::io::Errno,
    },
    /// The kernel does not take the contents back.
    #[error("cannot clear guest memory")]
    Clear(#[source] rustix::io::Errno),
    /// The memory file cannot be mapped.
    #[error("cannot map guest memory")]
    Map(#[source] vm_memory::mmap::FromRangesError),
}

/// The regions of a guest with `size` of RAM: start and length of each.
///
/// # Errors
/// [`MemoryError::Size`].
pub fn ram_ranges(size: Bytes) -> Result<Vec<(GuestAddress, u64)>, MemoryError> {
    if size < RAM_MIN || size > RAM_MAX || !size.0.is_multiple_of(1 << 20) {
        return Err(MemoryError::Size { size });
    }
    let low = size.0.min(layout::RAM_LOW_END);
    let mut ranges = vec![(GuestAddress(0), low)];
    if size.0 > low {
        ranges.push((GuestAddress(layout::RAM_HIGH_START), size.0 - low));
    }
    Ok(ranges)
}

/// Fresh guest RAM, all zeroes, not yet resident.
///
/// # Errors
/// When the size is not possible or the kernel refuses.
pub fn create(size: Bytes) -> Result<Arc<GuestMemory>, MemoryError> {
    let ranges = ram_ranges(size)?;
    let failed = |source| MemoryError::Create { size, source };
    let fd =
        rustix::fs::memfd_create("guest-ram", rustix::fs::MemfdFlags::CLOEXEC).map_err(failed)?;
    rustix::fs::ftruncate(&fd, size.0).map_err(failed)?;
    let file = Arc::new(File::from(fd));
    let mut offset = 0;
    let mut mapped = Vec::with_capacity(ranges.len());
    for (start, length) in ranges {
        let backing = FileOffset::from_arc(Arc::clone(&file), offset);
        let length_bytes = usize::try_from(length).map_err(|_| MemoryError::Size { size })?;
        mapped.push((start, length_bytes, Some(backing)));
        offset += length;
    }
    let memory = GuestMemory::from_ranges_with_files(mapped).map_err(MemoryError::Map)?;
    ask_for_huge_pages(&memory);
    Ok(Arc::new(memory))
}

/// Has the kernel back the RAM with huge pages where it may and can (madvise(2), `MADV_HUGEPAGE`): fewer faults when it
/// becomes resident, and fewer misses of address translation in the guest.
#[expect(unsafe_code, reason = "the kernel is handed guest memory's addresses")]
fn ask_for_huge_pages(memory: &GuestMemory) {
    use rustix::mm::{Advice, madvise};
    for region in memory.iter() {
        let length = usize::try_from(region.len()).unwrap_or(0);
        // SAFETY: the range is the region's mapping; the advice changes no byte and no protection.
        let asked = unsafe { madvise(region.as_ptr().cast(), length, Advice::LinuxHugepage) };
        if let Err(error) = asked {
            tracing::debug!(%error, "the kernel has no transparent huge pages");
        }
    }
}

/// Makes all of the RAM zero, as [`create`] made it: what was resident goes back to the host. A dirty log
/// does not see it.
///
/// # Errors
/// [`MemoryError::Clear`]; the contents are then undefined.
pub fn clear(memory: &GuestMemory) -> Result<(), MemoryError> {
    use rustix::fs::FallocateFlags;
    for region in memory.iter() {
        let backing = region.file_offset().ok_or(rustix::io::Errno::NODEV);
        let backing = backing.map_err(MemoryError::Clear)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(backing.file(), flags, backing.start(), region.len())
            .map_err(MemoryError::Clear)?;
    }
    Ok(())
}

/// The size of the RAM.
#[must_use]
pub fn size_of(memory: &GuestMemory) -> Bytes {
    Bytes(memory.iter().map(GuestMemoryRegion::len).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes as _;

    #[test]
    fn ram_beyond_the_mmio_hole_continues_at_4_gib() {
        let ranges = ram_ranges(Bytes::gib(4)).unwrap();
        assert_eq!(
            ranges,
            [
                (GuestAddress(0), 0xB000_0000),
                (GuestAddress(0x1_0000_0000), 0x5000_0000)
            ]
        );
        assert_eq!(ram_ranges(Bytes::mib(64)).unwrap().len(), 1);
    }

    /// The flags of the mapping that begins at `address`, of `/proc/self/smaps`.
    fn flags_of(address: *mut u8) -> String {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let head = format!("{:08x}-", address as usize);
        let mapping = maps.split_once(&head).expect("a mapping").1;
        let flags = mapping.split_once("VmFlags:").expect("its flags").1;
        flags.lines().next().unwrap().to_owned()
    }

    #[test]
    fn every_region_asks_for_huge_pages() {
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            assert!(
                std::env::var_os("CI").is_none(),
                "CI has transparent huge pages"
            );
            eprintln!("skipped: the kernel has no transparent huge pages");
            return;
        }
        let memory = create(Bytes::gib(3)).unwrap();
        for region in memory.iter() {
            let flags = flags_of(region.as_ptr());
            assert!(flags.split_whitespace().any(|flag| flag == "hg"), "{flags}");
        }
    }

    #[test]
    fn cleared_ram_reads_as_zero_in_every_region_and_can_be_written_again() {
        let memory = create(Bytes::gib(3)).unwrap();
        let last = GuestAddress(0x1_0000_0000 + (3 << 30) - 0xB000_0000 - 8);
        for at in [GuestAddress(0), GuestAddress(0xAFFF_FFF8), last] {
            memory.write_obj(u64::MAX, at).unwrap();
        }
        clear(&memory).unwrap();
        for at in [GuestAddress(0), GuestAddress(0xAFFF_FFF8), last] {
            assert_eq!(memory.read_obj::<u64>(at).unwrap(), 0);
            memory.write_obj(1_u64, at).unwrap();
            assert_eq!(memory.read_obj::<u64>(at).unwrap(), 1);
        }
    }

    #[test]
    fn an_absurd_size_is_refused_with_the_field_named() {
        for size in [
            Bytes(0),
            Bytes::mib(1),
            Bytes(u64::MAX),
            Bytes((64 << 20) + 1),
        ] {
            let error = create(size).unwrap_err();
            assert!(error.to_string().starts_with("memory: "), "{error}");
        }
    }

    #[test]
    fn ram_reads_back_across_its_whole_length_and_is_lazily_backed() {
        let memory = create(Bytes::gib(3)).unwrap();
        assert_eq!(size_of(&memory), Bytes::gib(3));
        let last = GuestAddress(0x1_0000_0000 + (3 << 30) - 0xB000_0000 - 8);
        memory.write_obj(0x1122_3344_5566_7788_u64, last).unwrap();
        assert_eq!(memory.read_obj::<u64>(last).unwrap(), 0x1122_3344_5566_7788);
        assert!(memory.write_obj(0_u8, GuestAddress(0xB000_0000)).is_err());
    }
}
