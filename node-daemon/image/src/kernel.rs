//! Whether a kernel can boot: what `bascule-vm` loads, and what else a kernel file may be.
//!
//! Bootable are a Linux bzImage with a 64-bit entry point (Documentation/arch/x86/boot.rst) and an x86-64 ELF
//! file with a Xen note that names a PVH entry (Xen, docs/misc/pvh.pandoc). The notes of an ELF file may be
//! anywhere in it, so they are collected while the file passes.

mod efi;
mod elf;

use crate::bytes::{u16_le, u32_le};
use crate::format::{Format, by_header};

pub(crate) use elf::Notes;

/// Why a kernel cannot boot here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the texts say all")]
pub enum KernelFault {
    #[error("{format}, not a kernel: {advice}", format = .0, advice = .0.kernel_advice())]
    Format(Format),
    #[error("a kernel for {0}, and guests here are x86-64")]
    OtherCpu(&'static str),
    #[error(
        "a unified kernel image (UKI), which needs UEFI firmware: take the kernel, the initrd and the command \
         line that it was made of"
    )]
    Unified,
    #[error("an EFI program that is no Linux bzImage: it needs UEFI firmware")]
    Efi,
    #[error("a compressed EFI kernel (zboot): take the bzImage")]
    Zboot,
    #[error("a U-Boot image: take the bzImage")]
    UBoot,
    #[error("a device tree or FIT image: take the bzImage")]
    DeviceTree,
    #[error("an ELF file of 32 bits: a 64-bit one with a PVH entry note, or a bzImage, is needed")]
    Elf32,
    #[error("an ELF file without a PVH entry note (CONFIG_PVH=y): take the bzImage")]
    NoPvhEntry,
    #[error("a bzImage without a 64-bit entry point: a 32-bit kernel, or one older than Linux 3.8")]
    No64BitEntry,
    #[error("truncated: it has {found} bytes, and its header says {expected}")]
    Truncated { expected: u64, found: u64 },
    #[error("not a kernel: neither a Linux bzImage nor a 64-bit ELF file")]
    NotAKernel,
}

/// Refuses what is recognized as something else than a bootable kernel. A file that is not recognized passes:
/// it may be an error page, which the check of the hash names better.
pub(crate) fn check_header(header: &[u8]) -> Result<(), KernelFault> {
    if let Some(format) = by_header(header) {
        return Err(KernelFault::Format(format));
    }
    if elf::is_elf(header) {
        return elf::check_header(header);
    }
    if is_bzimage(header) {
        return check_setup_header(header);
    }
    if let Some(cpu) = other_cpu(header) {
        return Err(KernelFault::OtherCpu(cpu));
    }
    if header.starts_with(b"\x27\x05\x19\x56") {
        return Err(KernelFault::UBoot);
    }
    if header.starts_with(b"\xd0\x0d\xfe\xed") {
        return Err(KernelFault::DeviceTree);
    }
    efi::check(header)
}

/// Refuses a whole kernel of `length` bytes that cannot boot. `header` is its beginning.
pub(crate) fn check_whole(header: &[u8], notes: &Notes, length: u64) -> Result<(), KernelFault> {
    check_header(header)?;
    if elf::is_elf(header) {
        if notes.have_pvh_entry() {
            Ok(())
        } else {
            Err(KernelFault::NoPvhEntry)
        }
    } else if is_bzimage(header) {
        check_length(header, length)
    } else {
        Err(KernelFault::NotAKernel)
    }
}

/// Whether a file is a kernel of any kind, which no initrd is.
pub(crate) fn is_kernel(header: &[u8]) -> bool {
    elf::is_elf(header) || is_bzimage(header) || header.starts_with(b"MZ")
}

fn is_bzimage(header: &[u8]) -> bool {
    header.get(0x202..0x206) == Some(b"HdrS".as_slice())
}

fn check_setup_header(header: &[u8]) -> Result<(), KernelFault> {
    let version = u16_le(header, 0x206).unwrap_or(0);
    let flags = u16_le(header, 0x236).unwrap_or(0);
    if version < PROTOCOL_MIN || flags & XLF_KERNEL_64 == 0 {
        return Err(KernelFault::No64BitEntry);
    }
    Ok(())
}

fn check_length(header: &[u8], found: u64) -> Result<(), KernelFault> {
    let sectors = match header.get(0x1f1) {
        None | Some(0) => 4,
        Some(sectors) => u64::from(*sectors),
    };
    let paragraphs = u64::from(u32_le(header, 0x1f4).unwrap_or(0));
    let expected = (sectors + 1) * SECTOR_BYTES + paragraphs * PARAGRAPH_BYTES;
    // The header counts whole paragraphs.
    if found + PARAGRAPH_BYTES <= expected {
        return Err(KernelFault::Truncated { expected, found });
    }
    Ok(())
}

/// The CPU of a kernel in the raw format of another architecture (Documentation/arch/arm64/booting.rst and
/// the like).
fn other_cpu(header: &[u8]) -> Option<&'static str> {
    let magic = |offset: usize, bytes: &[u8]| {
        let rest = header.get(offset..);
        rest.is_some_and(|rest| rest.starts_with(bytes))
    };
    if magic(56, b"ARM\x64") {
        Some("AArch64")
    } else if magic(0x24, b"\x18\x28\x6f\x01") {
        Some("32-bit Arm")
    } else if magic(56, b"RSC\x05") || magic(48, b"RISCV\0\0\0") {
        Some("RISC-V")
    } else {
        None
    }
}

/// `XLF_KERNEL_64` of `xloadflags`.
const XLF_KERNEL_64: u16 = 1;
/// Oldest boot protocol that has `xloadflags` and `init_size`.
const PROTOCOL_MIN: u16 = 0x020C;
/// Unit of `syssize`.
const PARAGRAPH_BYTES: u64 = 16;
/// Unit of `setup_sects`.
const SECTOR_BYTES: u64 = 512;

#[cfg(test)]
pub(crate) mod tests;
