//! EFI programs (PE/COFF): what they are for, and for which CPU.

use super::KernelFault;
use crate::bytes::{u16_le, u32_le_as_usize};

/// Refuses every EFI program. A bzImage is one too, and is recognized before.
pub(super) fn check(header: &[u8]) -> Result<(), KernelFault> {
    if !header.starts_with(b"MZ") {
        return Ok(());
    }
    if header.get(4..8) == Some(b"zimg".as_slice()) {
        return Err(KernelFault::Zboot);
    }
    let Some(pe) = u32_le_as_usize(header, 0x3c) else {
        return Ok(());
    };
    let signature = pe.checked_add(4).and_then(|end| header.get(pe..end));
    if signature != Some(b"PE\0\0".as_slice()) {
        return Ok(());
    }
    match u16_le(header, pe + 4) {
        Some(0x8664) => {}
        Some(0x014c) => return Err(KernelFault::OtherCpu("32-bit x86")),
        Some(0xaa64) => return Err(KernelFault::OtherCpu("AArch64")),
        Some(0x01c0 | 0x01c2 | 0x01c4) => return Err(KernelFault::OtherCpu("32-bit Arm")),
        Some(0x5032 | 0x5064) => return Err(KernelFault::OtherCpu("RISC-V")),
        Some(0x6232 | 0x6264) => return Err(KernelFault::OtherCpu("LoongArch")),
        _ => return Err(KernelFault::Efi),
    }
    Err(if has_section(header, pe, b".linux\0\0") {
        KernelFault::Unified
    } else {
        KernelFault::Efi
    })
}

/// Whether the PE file has a section of that name. The section table follows the optional header.
fn has_section(header: &[u8], pe: usize, name: &[u8; 8]) -> bool {
    let (Some(sections), Some(optional)) = (u16_le(header, pe + 6), u16_le(header, pe + 20)) else {
        return false;
    };
    let table = pe + 24 + usize::from(optional);
    (0..usize::from(sections)).any(|index| {
        let rest = header.get(table + index * SECTION_BYTES..);
        rest.is_some_and(|rest| rest.starts_with(name))
    })
}

const SECTION_BYTES: usize = 40;
