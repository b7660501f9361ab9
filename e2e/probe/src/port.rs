//! Port I/O from ring 3.

use core::arch::asm;

/// Reads a byte.
pub(crate) fn read8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: port I/O touches no memory, and the guest has no state that a port could corrupt.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

/// Reads a 16-bit word.
pub(crate) fn read16(port: u16) -> u16 {
    let value: u16;
    // SAFETY: as in `read8`.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack)) };
    value
}

/// Reads a 32-bit word.
pub(crate) fn read32(port: u16) -> u32 {
    let value: u32;
    // SAFETY: as in `read8`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) };
    value
}

/// Writes a byte.
pub(crate) fn write8(port: u16, value: u8) {
    // SAFETY: as in `read8`.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

/// Writes a 16-bit word.
pub(crate) fn write16(port: u16, value: u16) {
    // SAFETY: as in `read8`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) };
}

/// Writes a 32-bit word.
pub(crate) fn write32(port: u16, value: u32) {
    // SAFETY: as in `read8`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) };
}

/// Writes bytes in turn to one port, by one instruction: one exit instead of one per byte.
pub(crate) fn write_string(port: u16, bytes: &[u8]) {
    // SAFETY: the instruction reads exactly the bytes of the slice; the direction flag is clear.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rcx") bytes.len() => _,
             inout("rsi") bytes.as_ptr() => _, options(readonly, nostack, preserves_flags));
    }
}

/// Fills `buffer` from one port by one string instruction, in units of `width` bytes: 1, 2 or 4.
pub(crate) fn read_string(port: u16, width: usize, buffer: &mut [u8]) {
    let (count, at) = (buffer.len() / width, buffer.as_mut_ptr());
    match width {
        // SAFETY: the instruction writes within the buffer; the direction flag is clear (here and below).
        1 => unsafe {
            asm!("rep insb", in("dx") port, inout("rcx") count => _, inout("rdi") at => _,
                 options(nostack, preserves_flags));
        },
        // SAFETY: as above.
        2 => unsafe {
            asm!("rep insw", in("dx") port, inout("rcx") count => _, inout("rdi") at => _,
                 options(nostack, preserves_flags));
        },
        // SAFETY: as above.
        _ => unsafe {
            asm!("rep insd", in("dx") port, inout("rcx") count => _, inout("rdi") at => _,
                 options(nostack, preserves_flags));
        },
    }
}

/// As [`write_string`], in units of `width` bytes: 1, 2 or 4.
pub(crate) fn write_words(port: u16, width: usize, words: &[u8]) {
    let (count, at) = (words.len() / width, words.as_ptr());
    match width {
        // SAFETY: the instruction reads within the slice; the direction flag is clear (here and below).
        1 => unsafe {
            asm!("rep outsb", in("dx") port, inout("rcx") count => _, inout("rsi") at => _,
                 options(readonly, nostack, preserves_flags));
        },
        // SAFETY: as above.
        2 => unsafe {
            asm!("rep outsw", in("dx") port, inout("rcx") count => _, inout("rsi") at => _,
                 options(readonly, nostack, preserves_flags));
        },
        // SAFETY: as above.
        _ => unsafe {
            asm!("rep outsd", in("dx") port, inout("rcx") count => _, inout("rsi") at => _,
                 options(readonly, nostack, preserves_flags));
        },
    }
}
