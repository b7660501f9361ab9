//! Making a destination's memory resident before a source is admitted.

use std::io;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::machine::MachineHandle;
use crate::memory::GuestMemory;

/// Makes all of the machine's memory resident, so that a destination without enough of it fails
/// before the source has begun.
///
/// # Errors
/// When the kernel has not got the memory.
pub fn prefault(machine: &MachineHandle) -> io::Result<()> {
    populate(machine.memory())
}

#[expect(unsafe_code, reason = "the kernel is handed guest memory's addresses")]
fn populate(memory: &GuestMemory) -> io::Result<()> {
    use rustix::mm::{Advice, madvise};
    for region in memory.iter() {
        let length = usize::try_from(region.len()).unwrap_or(0);
        for start in (0..length).step_by(PREFAULT_BYTES) {
            let step = PREFAULT_BYTES.min(length - start);
            let address = region.as_ptr().wrapping_add(start).cast();
            // SAFETY: the range lies within one mapping of guest memory, which `memory` keeps
            // alive; populating it changes no byte and no protection.
            let populated = unsafe { madvise(address, step, Advice::LinuxPopulateWrite) };
            match populated {
                // Kernels before 5.14 do it page by page, when the pages are written.
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(())
}

/// Bytes of memory made resident by one system call.
const PREFAULT_BYTES: usize = 64 << 20;
