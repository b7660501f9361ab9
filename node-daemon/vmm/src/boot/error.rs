//! Why a kernel cannot be booted.

use std::io;

use super::source::ImagesError;

/// Why a kernel cannot be booted. Every text names the field of the configuration.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum BootError {
    /// Neither kind of kernel.
    #[error("boot.kernel: not a kernel: neither a Linux bzImage nor a 64-bit ELF file")]
    NotAKernel,
    /// An ELF file without a PVH entry note.
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
        length: usize,
        /// The most that this kernel takes.
        max: usize,
    },
    /// Guest memory is too small for the boot structures.
    #[error("memory: too small to boot")]
    Memory(#[source] vm_memory::GuestMemoryError),
    /// The images cannot be opened.
    #[error(transparent)]
    Images(#[from] ImagesError),
}
