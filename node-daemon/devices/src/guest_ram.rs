//! Guest memory as the devices see it.

use vm_memory::bitmap::AtomicBitmap;

/// Guest memory with a dirty bitmap: every device write through it marks its pages dirty.
pub type GuestRam = vm_memory::GuestMemoryMmap<AtomicBitmap>;
