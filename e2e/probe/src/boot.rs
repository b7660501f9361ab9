//! From the PVH entry (32-bit, ring 0, no paging) to Rust in ring 3.
//!
//! Ring 0 does as little as possible: the tables are made by the assembler, and the machine that
//! tests run on may interpret ring 0 instead of executing it. Ring 3 keeps port I/O by the I/O
//! bitmap of the task state segment and reaches all of the lower 4 GiB by identity-mapped pages.
//! There is no interrupt descriptor table: the guest polls, and any fault is a triple fault, which
//! is what a test wants to see.
//!
//! PVH: the Xen documentation, `docs/misc/pvh.pandoc` and `public/arch-x86/hvm/start_info.h`.

use core::arch::global_asm;

global_asm!(
    r#"
    .section .note.Xen, "a", @note
    .balign 4
    .long 4
    .long 8
    .long 18
    .asciz "Xen"
    .quad pvh_start

    .section .boot.text, "ax"
    .code32
    .globl pvh_start
    pvh_start:
        cld
        movl %ebx, start_info_address
        movl $task_state, %eax
        movw %ax, gdt_task + 2
        shrl $16, %eax
        movb %al, gdt_task + 4
        movb %ah, gdt_task + 7
        lgdt gdt_pointer
        movl $0x620, %eax
        movl %eax, %cr4
        movl $pml4, %eax
        movl %eax, %cr3
        movl $0xc0000080, %ecx
        movl $0x100, %eax
        xorl %edx, %edx
        wrmsr
        movl $0x80000023, %eax
        movl %eax, %cr0
        ljmp $0x08, $long_mode
    .code64
    long_mode:
        xorl %eax, %eax
        movl %eax, %ds
        movl %eax, %es
        movl %eax, %ss
        movl $0x28, %eax
        ltr %ax
        leaq kernel_stack_end(%rip), %rsp
        pushq $0x1b
        leaq user_stack_end(%rip), %rax
        pushq %rax
        pushq $2
        pushq $0x23
        leaq ring3(%rip), %rax
        pushq %rax
        iretq
    ring3:
        xorl %ebp, %ebp
        movl start_info_address(%rip), %edi
        call probe_main
        ud2

    .section .boot.data, "aw"
    .balign 4096
    pml4:
        .quad pdpt + 7
        .fill 511, 8, 0
    pdpt:
        .quad pd + 0x0007, pd + 0x1007, pd + 0x2007, pd + 0x3007
        .fill 508, 8, 0
    pd:
        .set frame, 0
        .rept 2048
        .quad (frame << 21) + 0x87
        .set frame, frame + 1
        .endr
    .balign 16
    gdt:
        .quad 0
        .quad 0x00af9a000000ffff
        .quad 0x00cf92000000ffff
        .quad 0x00cff2000000ffff
        .quad 0x00affa000000ffff
    gdt_task:
        .quad 0x0000890000002068
        .quad 0
    gdt_end:
    gdt_pointer:
        .word gdt_end - gdt - 1
        .long gdt
    .balign 8
    start_info_address:
        .quad 0
    .balign 16
    task_state:
        .fill 102, 1, 0
        .word 104
        .fill 8192, 1, 0
        .byte 0xff

    .section .bss.boot, "aw", @nobits
    .balign 16
        .skip 512
    kernel_stack_end:
        .skip 262144
    user_stack_end:
    "#,
    options(att_syntax)
);

/// What the loader says about the machine, copied out of the loader's memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine {
    pub(crate) cmdline: &'static str,
    /// Where the ACPI tables start; 0 when there are none.
    pub(crate) rsdp: u64,
    /// The largest stretch of RAM below 4 GiB: first byte and length.
    pub(crate) ram: (u64, u64),
}

impl Machine {
    /// Reads `struct hvm_start_info`.
    ///
    /// # Safety
    /// `start_info` must be the address that the loader passed in EBX, and nothing may have
    /// overwritten the loader's memory since.
    pub(crate) unsafe fn read(start_info: u64) -> Option<Self> {
        // SAFETY: the caller vouches for the address; the structure lies in identity-mapped RAM.
        let info = unsafe { read_at::<StartInfo>(start_info) };
        if info.magic != START_INFO_MAGIC {
            return None;
        }
        let mut ram = (0, 0);
        if info.version >= 1 {
            for index in 0..u64::from(info.memmap_entries) {
                // SAFETY: the loader says that so many entries are there.
                let entry = unsafe { read_at::<MemoryEntry>(info.memmap + index * ENTRY_BYTES) };
                let end = entry.address.saturating_add(entry.size).min(MAPPED_BYTES);
                let size = end.saturating_sub(entry.address);
                if entry.kind == KIND_RAM && size > ram.1 {
                    ram = (entry.address, size);
                }
            }
        }
        // SAFETY: the loader put a NUL-terminated command line there, or no address.
        let cmdline = unsafe { read_text(info.cmdline) };
        Some(Self {
            cmdline,
            rsdp: info.rsdp,
            ram,
        })
    }
}

/// Reads a `T` from identity-mapped memory.
///
/// # Safety
/// `address` must be that of memory that holds a `T` which nothing writes.
pub(crate) unsafe fn read_at<T: zerocopy::FromBytes>(address: u64) -> T {
    let pointer = address as usize as *const T;
    // SAFETY: the caller vouches for the memory; unaligned reads need no alignment.
    unsafe { pointer.read_unaligned() }
}

/// # Safety
/// `address` must be 0 or that of a NUL-terminated text that stays as it is.
unsafe fn read_text(address: u64) -> &'static str {
    if address == 0 {
        return "";
    }
    let start = address as usize as *const core::ffi::c_char;
    // SAFETY: the caller says that the text ends in a NUL and stays.
    let text = unsafe { core::ffi::CStr::from_ptr(start) };
    text.to_str().unwrap_or("")
}

#[derive(zerocopy::FromBytes)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    cmdline: u64,
    rsdp: u64,
    memmap: u64,
    memmap_entries: u32,
    reserved: u32,
}

#[derive(zerocopy::FromBytes)]
#[repr(C)]
struct MemoryEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

const START_INFO_MAGIC: u32 = 0x336e_c578;
const KIND_RAM: u32 = 1;
const ENTRY_BYTES: u64 = 24;
const MAPPED_BYTES: u64 = 4 << 30;
