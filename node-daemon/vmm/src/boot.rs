//! Putting a kernel into guest memory, and the boot processor at its entry.
//!
//! Two kinds of kernel: an ELF file with a Xen note naming its PVH entry (32-bit, no paging), and a
//! Linux bzImage, entered at its 64-bit entry point (Documentation/arch/x86/boot.rst, "64-bit boot
//! protocol"). Both get the command line, the initrd, the memory map and the ACPI root pointer.

mod bzimage;
mod map;
mod pvh;
mod registers;

use std::io::{self, Cursor, Read};

use kvm_ioctls::VcpuFd;
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes as _, GuestAddress};

use crate::kvm::KvmError;
use crate::layout;
use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::power;

/// What a machine boots.
pub struct BootSource {
    /// The kernel: bzImage, or ELF with a PVH note.
    pub kernel: Vec<u8>,
    /// The initial RAM disk.
    pub initrd: Option<Initrd>,
    /// The kernel command line.
    pub cmdline: String,
}

/// An initial RAM disk, read straight into guest memory.
pub struct Initrd {
    /// Its length in bytes.
    pub length: u64,
    /// Its bytes.
    pub content: Box<dyn Read + Send>,
}

impl std::fmt::Debug for BootSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BootSource")
            .field("kernel_bytes", &self.kernel.len())
            .field("initrd", &self.initrd)
            .field("cmdline", &self.cmdline)
            .finish()
    }
}

impl std::fmt::Debug for Initrd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Initrd")
            .field("length", &self.length)
            .finish_non_exhaustive()
    }
}

/// Why a kernel cannot be booted. Every text names the field of the configuration.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Neither kind of kernel.
    #[error("boot.kernel: not a kernel: neither a Linux bzImage nor a 64-bit ELF file")]
    NotAKernel,
    /// An ELF file that does not say where its PVH entry is.
    #[error("boot.kernel: an ELF file without a PVH entry note")]
    NoPvhEntry,
    /// A bzImage without a 64-bit entry.
    #[error("boot.kernel: a bzImage without a 64-bit entry point")]
    No64BitEntry,
    /// Shorter than its own header says.
    #[error("boot.kernel: truncated: {found} bytes of {expected}")]
    Truncated {
        /// The length by the header.
        expected: u64,
        /// The length of the file.
        found: u64,
    },
    /// The loader cannot place it.
    #[error("boot.kernel: does not load")]
    Load(#[source] linux_loader::loader::Error),
    /// The kernel and the initrd do not both fit.
    #[error("boot.initrd: {length} bytes do not fit beside the kernel in the guest's memory")]
    InitrdTooLarge {
        /// The initrd's length in bytes.
        length: u64,
    },
    /// The initrd cannot be read.
    #[error("boot.initrd: cannot be read")]
    InitrdRead(#[source] io::Error),
    /// The command line is too long or holds a NUL.
    #[error("boot.cmdline: {length} bytes, or with a NUL among them; at most {max} are possible")]
    Cmdline {
        /// Its length.
        length: usize,
        /// The most that this kernel takes.
        max: usize,
    },
    /// Guest memory is too small for the boot structures.
    #[error("memory: too small to boot")]
    Memory(#[source] vm_memory::GuestMemoryError),
    /// The vCPU does not take its first registers.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// Where the boot processor begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// 32-bit protected mode, EBX = `hvm_start_info`.
    Pvh(u64),
    /// Long mode, RSI = `boot_params`.
    Linux64(u64),
}

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

/// Puts the boot processor at `entry`.
pub(crate) fn set_registers(
    memory: &GuestMemory,
    vcpu: &VcpuFd,
    entry: Entry,
) -> Result<(), BootError> {
    match entry {
        Entry::Pvh(address) => registers::pvh(memory, vcpu, address),
        Entry::Linux64(address) => registers::linux64(memory, vcpu, address),
    }
}

/// All the firmware that there is. Linux on a hardware-reduced machine restarts by EFI services, and
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

/// Puts a kernel of `L`'s kind where kernels go.
fn place<L: KernelLoader>(
    memory: &GuestMemory,
    kernel: &[u8],
) -> Result<KernelLoaderResult, BootError> {
    let himem = Some(GuestAddress(layout::HIMEM_START));
    L::load(memory, None, &mut Cursor::new(kernel), himem).map_err(BootError::Load)
}

/// Guest memory ends before a boot structure.
fn no_memory_at(address: u64) -> BootError {
    let at = GuestAddress(address);
    BootError::Memory(vm_memory::GuestMemoryError::InvalidGuestAddress(at))
}

/// Writes the command line, at most `max` bytes and a NUL.
fn write_cmdline(memory: &GuestMemory, cmdline: &str, max: usize) -> Result<(), BootError> {
    let max = max.min(layout::CMDLINE_SIZE_MAX - 1);
    if cmdline.len() > max || cmdline.contains('\0') {
        return Err(BootError::Cmdline {
            length: cmdline.len(),
            max,
        });
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(layout::CMDLINE))
        .map_err(BootError::Memory)
}

/// Reads the initrd to the top of low memory, above `kernel_end` and below `limit`.
fn load_initrd(
    memory: &GuestMemory,
    initrd: Option<Initrd>,
    kernel_end: u64,
    limit: u64,
) -> Result<Option<(u64, u64)>, BootError> {
    let Some(Initrd {
        length,
        mut content,
    }) = initrd
    else {
        return Ok(None);
    };
    let too_large = BootError::InitrdTooLarge { length };
    let low_end = map::low_ram_end(memory).min(limit);
    let start = low_end
        .checked_sub(length)
        .map(|start| start / PAGE_SIZE * PAGE_SIZE);
    let Some(start) = start.filter(|start| *start >= kernel_end) else {
        return Err(too_large);
    };
    let mut buffer = vec![0; COPY_BYTES];
    let mut done = 0;
    while done < length {
        let step = usize::try_from(length - done)
            .unwrap_or(usize::MAX)
            .min(COPY_BYTES);
        let chunk = buffer.get_mut(..step).unwrap_or_default();
        content.read_exact(chunk).map_err(BootError::InitrdRead)?;
        memory
            .write_slice(chunk, GuestAddress(start + done))
            .map_err(BootError::Memory)?;
        done += u64::try_from(step).unwrap_or(u64::MAX);
    }
    Ok(Some((start, length)))
}

/// How much of an initrd is copied at once.
const COPY_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests;
