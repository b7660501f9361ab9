//! bascule-vm: one process per virtual machine: the KVM guest, its devices, its disk I/O, its
//! migration streams.

pub mod dirty;
mod ioctl;
pub mod kvm;
pub mod layout;
pub mod memory;
#[cfg(test)]
mod testing;

pub use dirty::{DirtyBitmap, DirtyError, DirtyTracker, KvmDirtyTracker, PAGES_PER_WORD};
pub use memory::{GuestMemory, MemoryError, PAGE_SIZE};
