//! Accesses of any width to any address of the lower 4 GiB, each by one instruction.
//!
//! All of that is mapped. Rust's objects are within the image; whatever is read and written here lies outside it.

use core::arch::asm;

/// Reads `width` bytes: 1, 2, 4, 8, or 16, of which the lower eight are returned.
pub(super) fn read(address: u64, width: u64) -> u64 {
    let value: u64;
    match width {
        // SAFETY: the address is mapped, and not that of an object (here and below).
        1 => unsafe {
            asm!("movzx {0:e}, byte ptr [{1}]", out(reg) value, in(reg) address, options(nostack, preserves_flags));
        },
        // SAFETY: as above.
        2 => unsafe {
            asm!("movzx {0:e}, word ptr [{1}]", out(reg) value, in(reg) address, options(nostack, preserves_flags));
        },
        // SAFETY: as above.
        4 => unsafe {
            asm!("mov {0:e}, dword ptr [{1}]", out(reg) value, in(reg) address, options(nostack, preserves_flags));
        },
        // SAFETY: as above.
        8 => unsafe {
            asm!("mov {0}, qword ptr [{1}]", out(reg) value, in(reg) address, options(nostack, preserves_flags));
        },
        // SAFETY: as above.
        _ => unsafe {
            asm!("movups {2}, [{1}]", "movq {0}, {2}", out(reg) value, in(reg) address, out(xmm_reg) _,
                 options(nostack, preserves_flags));
        },
    }
    value
}

/// Writes the lower `width` bytes of `value`: 1, 2, 4, 8, or 16, twice the same eight.
pub(super) fn write(address: u64, width: u64, value: u64) {
    match width {
        // SAFETY: the address is mapped, and not that of an object (here and below).
        1 => unsafe {
            asm!("mov byte ptr [{0}], {1}", in(reg) address, in(reg_byte) value as u8, options(nostack, preserves_flags));
        },
        // SAFETY: as above.
        2 => unsafe {
            asm!("mov word ptr [{0}], {1:x}", in(reg) address, in(reg) value, options(nostack, preserves_flags));
        },
        // SAFETY: as above.
        4 => unsafe {
            asm!("mov dword ptr [{0}], {1:e}", in(reg) address, in(reg) value, options(nostack, preserves_flags));
        },
        // SAFETY: as above.
        8 => unsafe {
            asm!("mov qword ptr [{0}], {1}", in(reg) address, in(reg) value, options(nostack, preserves_flags));
        },
        // SAFETY: as above.
        _ => unsafe {
            asm!("movq {2}, {1}", "punpcklqdq {2}, {2}", "movups [{0}], {2}", in(reg) address, in(reg) value,
                 out(xmm_reg) _, options(nostack, preserves_flags));
        },
    }
}

/// Copies bytes by one string instruction; `to` is not that of an object but of a buffer.
pub(super) fn copy(to: u64, from: u64, count: u64) {
    // SAFETY: both addresses are mapped, and what is at `to` may be overwritten; the direction flag is clear.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _,
             options(nostack, preserves_flags));
    }
}

/// Writes bytes to memory.
pub(super) fn write_bytes(address: u64, bytes: &[u8]) {
    copy(address, bytes.as_ptr() as u64, bytes.len() as u64);
}

pub(super) const WIDTHS: [u64; 5] = [1, 2, 4, 8, 16];
