//! Putting a kernel into guest memory, and the boot processor at its entry.
//!
//! Two kinds of kernel: an ELF file with a Xen note naming its PVH entry (32-bit, no paging), and a
//! Linux bzImage, entered at its 64-bit entry point (Documentation/arch/x86/boot.rst, "64-bit boot
//! protocol"). Both get the command line, the initrd, the memory map and the ACPI root pointer.

mod bzimage;
mod error;
mod map;
mod placement;
mod pvh;
mod registers;
mod source;

use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Bytes as _, GuestAddress};

use crate::layout;
use crate::memory::GuestMemory;
use crate::power;

pub use error::BootError;
pub(crate) use placement::Entry;
pub use source::{BootSource, ImagesError, Initrd, OpenImages};

/// Loads `source` into `memory`; `rsdp` is the ACPI root pointer.
pub(crate) fn load(
    memory: &GuestMemory,
    source: BootSource,
    rsdp: GuestAddress,
) -> Result<Entry, BootError> {
    write_reset_vector(memory)?;
    let magic = source.kernel.get(..4);
    if magic == Some(b"\x7fELF".as_slice()) {
        pvh::load(memory, source, rsdp)
    } else if source.kernel.get(0x202..0x206) == Some(b"HdrS".as_slice()) {
        bzimage::load(memory, source, rsdp)
    } else {
        Err(BootError::NotAKernel)
    }
}

/// The registers with which the boot processor begins at `entry`, and in memory the tables to which they
/// point. `sregs` are its special registers at power-on.
pub(crate) fn registers(
    memory: &GuestMemory,
    sregs: kvm_sregs,
    entry: Entry,
) -> Result<(kvm_regs, kvm_sregs), BootError> {
    match entry {
        Entry::Pvh(address) => registers::pvh(memory, sregs, address),
        Entry::Linux64(address) => registers::linux64(memory, sregs, address),
    }
}

/// The only firmware. Linux on a hardware-reduced machine restarts by EFI services, and
/// where there are none by jumping to the BIOS (arch/x86/kernel/reboot.c): it never tries the ACPI
/// reset register, so this does.
fn write_reset_vector(memory: &GuestMemory) -> Result<(), BootError> {
    let [low, high] = layout::ACPI_RESET_PORT.to_le_bytes();
    let code = [
        0xBA,
        low,
        high, // mov dx, the reset register
        0xB0,
        power::RESET_VALUE, // mov al, its value
        0xEE,               // out dx, al
        0xEB,
        0xFE, // jmp $
    ];
    let vector = GuestAddress(layout::RESET_VECTOR);
    memory.write_slice(&code, vector).map_err(BootError::Memory)
}

#[cfg(test)]
mod tests;
