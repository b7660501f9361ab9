//! Tiny guests in machine code. Shared with the tests of the process.

/// Counts at 2 MiB and prints one letter of the alphabet's first sixteen per count, without end.
pub(crate) const COUNTER: &[u8] = &[
    0x66, 0xBA, 0xF8, 0x03, // mov dx, 0x3F8
    0xFF, 0x05, 0x00, 0x00, 0x20, 0x00, // again: inc dword [0x200000]
    0xA1, 0x00, 0x00, 0x20, 0x00, // mov eax, [0x200000]
    0x24, 0x0F, // and al, 15
    0x04, 0x61, // add al, 'a'
    0xEE, // out dx, al
    0xEB, 0xEE, // jmp again
];
/// Switches itself off by the ACPI sleep control register.
pub(crate) const POWER_OFF: &[u8] = &[
    0x66, 0xBA, 0x00, 0x06, // mov dx, 0x600
    0xB0, 0x34, // mov al, SLP_TYP 5 | SLP_EN
    0xEE, // out dx, al
    0xEB, 0xFE, // jmp $
];
/// Resets itself by the keyboard controller.
pub(crate) const RESET: &[u8] = &[
    0xB0, 0xFE, // mov al, 0xFE
    0xE6, 0x64, // out 0x64, al
    0xEB, 0xFE, // jmp $
];
/// Goes to real mode and jumps to the BIOS, as Linux does to restart a hardware-reduced machine
/// without EFI.
pub(crate) const JUMP_TO_BIOS: &[u8] = &[
    0x0F, 0x01, 0x15, 0x22, 0x00, 0x10, 0x00, // lgdt [0x100022]
    0x0F, 0x01, 0x1D, 0x38, 0x00, 0x10, 0x00, // lidt [0x100038]
    0xEA, 0x15, 0x00, 0x00, 0x00, 0x08, 0x00, // jmp 8:0x15, to 16-bit code
    0x0F, 0x20, 0xC0, // mov eax, cr0
    0x24, 0xFE, // and al, not PE
    0x0F, 0x22, 0xC0, // mov cr0, eax
    0xEA, 0x00, 0x00, 0xFF, 0xFF, // jmp 0xFFFF:0
    0x0F, 0x00, 0x28, 0x00, 0x10, 0x00, // descriptor table: limit and base
    0, 0, 0, 0, 0, 0, 0, 0, // null
    0xFF, 0xFF, 0x00, 0x00, 0x10, 0x9B, 0x00, 0x00, // 16-bit code at 0x100000
    0xFF, 0x03, 0x00, 0x00, 0x00, 0x00, // interrupt table: limit and base
];
/// An invalid instruction without an interrupt table: a triple fault.
pub(crate) const TRIPLE_FAULT: &[u8] = &[0x0F, 0x0B];
/// Polls the power events until the button is pressed, then switches itself off.
pub(crate) const AWAIT_BUTTON: &[u8] = &[
    0x66, 0xBA, 0x03, 0x06, // mov dx, 0x603
    0xEC, // again: in al, dx
    0xA8, 0x01, // test al, 1
    0x74, 0xFB, // jz again
    0x66, 0xBA, 0x00, 0x06, // mov dx, 0x600
    0xB0, 0x34, // mov al, SLP_TYP 5 | SLP_EN
    0xEE, // out dx, al
    0xEB, 0xFE, // jmp $
];
/// Echoes its serial input.
pub(crate) const ECHO: &[u8] = &[
    0x66, 0xBA, 0xFD, 0x03, // again: mov dx, 0x3FD
    0xEC, // in al, dx
    0xA8, 0x01, // test al, data ready
    0x74, 0xF7, // jz again
    0x66, 0xBA, 0xF8, 0x03, // mov dx, 0x3F8
    0xEC, // in al, dx
    0xEE, // out dx, al
    0xEB, 0xEF, // jmp again
];

/// Where [`elf`] loads code.
const CODE_AT: u32 = 0x10_0000;

/// `code` as an ELF file with a PVH entry.
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    const NOTE: u64 = 20;
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for half in [2_u16, 62] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1_u32.to_le_bytes());
    for quad in [u64::from(CODE_AT), 64, 0] {
        file.extend(quad.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 2, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let length = code.len() as u64;
    let segments = [
        (1_u32, HEADERS + NOTE, u64::from(CODE_AT), length),
        (4_u32, HEADERS, 0, NOTE),
    ];
    for (kind, offset, address, length) in segments {
        file.extend(kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for quad in [offset, address, address, length, length, 4] {
            file.extend(quad.to_le_bytes());
        }
    }
    for word in [4_u32, 4, 18] {
        file.extend(word.to_le_bytes());
    }
    file.extend(b"Xen\0");
    file.extend(CODE_AT.to_le_bytes());
    file.extend(code);
    file
}
