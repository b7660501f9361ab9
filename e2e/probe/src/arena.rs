//! Run-time memory allocation: a static area; memory is never freed.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicUsize, Ordering};

#[repr(C, align(4096))]
struct Area(UnsafeCell<[u8; AREA_BYTES]>);

// SAFETY: the guest has one thread, and each byte of the area is handed out at most once.
unsafe impl Sync for Area {}

static AREA: Area = Area(UnsafeCell::new([0; AREA_BYTES]));
static USED: AtomicUsize = AtomicUsize::new(0);

/// Zeroed pages, never handed out again.
pub(crate) fn pages(count: usize) -> &'static mut [u8] {
    let bytes = count * PAGE_BYTES;
    let start = USED.fetch_add(bytes, Ordering::Relaxed);
    assert!(start + bytes <= AREA_BYTES, "the arena is used up");
    let base = AREA.0.get().cast::<u8>().wrapping_add(start);
    // SAFETY: [start, start + bytes) lies within the area, is zero from the start, and is handed
    // out here only, as `USED` only grows.
    unsafe { core::slice::from_raw_parts_mut(base, bytes) }
}

/// At least `count` zeroed bytes, page-aligned, never handed out again.
pub(crate) fn bytes(count: usize) -> &'static mut [u8] {
    &mut pages(count.div_ceil(PAGE_BYTES))[..count]
}

pub(crate) const PAGE_BYTES: usize = 4096;
const AREA_BYTES: usize = 2 << 20;
