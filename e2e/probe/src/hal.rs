//! The hardware abstraction of `virtio-drivers`: guest-physical and virtual addresses are identical.

use core::ptr::NonNull;

use virtio_drivers::{BufferDirection, Hal, PhysAddr};

use crate::arena;

/// Identity-mapped memory without an IOMMU.
#[derive(Debug)]
pub(crate) struct Identity;

// SAFETY: the arena's pages are zeroed, aligned and handed out once; virtual and physical addresses
// are the same throughout.
unsafe impl Hal for Identity {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let memory = NonNull::from(arena::pages(pages)).cast::<u8>();
        (memory.as_ptr() as u64, memory)
    }

    /// Memory of the arena is never reused: devices live as long as the guest.
    unsafe fn dma_dealloc(_paddr: PhysAddr, _vaddr: NonNull<u8>, _pages: usize) -> i32 {
        0
    }

    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, _size: usize) -> NonNull<u8> {
        NonNull::new(paddr as usize as *mut u8).unwrap_or(NonNull::dangling())
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr() as u64
    }

    unsafe fn unshare(_paddr: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}
