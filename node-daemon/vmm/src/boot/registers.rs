//! First registers of the boot processor.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes as _, GuestAddress};

use super::error::BootError;
use crate::layout;
use crate::memory::{GuestMemory, PAGE_SIZE};

/// CR0.PE, CR0.ET (SDM vol. 3, 2.5).
const CR0_PROTECTED: u64 = (1 << 0) | (1 << 4);
/// CR0.PG.
const CR0_PAGING: u64 = 1 << 31;
/// CR4.PAE.
const CR4_PAE: u64 = 1 << 5;
/// EFER.LME and EFER.LMA.
const EFER_LONG_MODE: u64 = (1 << 8) | (1 << 10);
/// RFLAGS with nothing but its fixed bit.
const RFLAGS_FIXED: u64 = 2;
/// Page table entry: present and writable; for a leaf of 2 MiB also the size bit.
const TABLE: u64 = 0b11;
const LEAF_2M: u64 = TABLE | (1 << 7);
/// Page tables map this many GiB, one directory each.
const MAPPED_GIB: u64 = 4;

/// Access bytes and flags of a descriptor, and its selector in our table.
struct Descriptor {
    selector: u16,
    type_: u8,
    long: bool,
}

const CODE_32: Descriptor = Descriptor {
    selector: 0x08,
    type_: 0xB,
    long: false,
};
const CODE_64: Descriptor = Descriptor {
    selector: 0x10,
    type_: 0xB,
    long: true,
};
const DATA: Descriptor = Descriptor {
    selector: 0x18,
    type_: 0x3,
    long: false,
};
const TSS_SELECTOR: u16 = 0x20;
/// Limit of the task state segment: its fixed part.
const TSS_LIMIT: u32 = 0x67;
/// A busy 32-bit task state segment, which VM entry demands.
const TSS_TYPE: u8 = 0xB;

/// The table behind the selectors above: a guest that reloads a segment before it has its own table
/// finds the same there.
const GDT: [u64; 5] = [
    0,
    0x00CF_9B00_0000_FFFF,
    0x00AF_9B00_0000_FFFF,
    0x00CF_9300_0000_FFFF,
    0x0000_8B00_0000_0067,
];

/// State at a PVH entry: protected mode, flat segments, no paging, EBX pointing at the start info.
pub(super) fn pvh(
    memory: &GuestMemory,
    mut sregs: kvm_sregs,
    entry: u64,
) -> Result<(kvm_regs, kvm_sregs), BootError> {
    write_tables(memory, &mut sregs)?;
    set_segments(&mut sregs, &CODE_32);
    sregs.cr0 = CR0_PROTECTED;
    sregs.cr4 = 0;
    let regs = kvm_regs {
        rip: entry,
        rbx: layout::PVH_START_INFO,
        rflags: RFLAGS_FIXED,
        ..Default::default()
    };
    Ok((regs, sregs))
}

/// State at the 64-bit entry of a bzImage: long mode, identity mapping, RSI pointing at the zero page.
pub(super) fn linux64(
    memory: &GuestMemory,
    mut sregs: kvm_sregs,
    entry: u64,
) -> Result<(kvm_regs, kvm_sregs), BootError> {
    write_tables(memory, &mut sregs)?;
    set_segments(&mut sregs, &CODE_64);
    write_page_tables(memory)?;
    sregs.cr0 = CR0_PROTECTED | CR0_PAGING;
    sregs.cr3 = layout::BOOT_PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LONG_MODE;
    let regs = kvm_regs {
        rip: entry,
        rsi: layout::ZERO_PAGE,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rflags: RFLAGS_FIXED,
        ..Default::default()
    };
    Ok((regs, sregs))
}

fn write_tables(memory: &GuestMemory, sregs: &mut kvm_sregs) -> Result<(), BootError> {
    for (address, entry) in (layout::BOOT_GDT..).step_by(size_of::<u64>()).zip(GDT) {
        memory
            .write_obj(entry, GuestAddress(address))
            .map_err(BootError::Memory)?;
    }
    sregs.gdt.base = layout::BOOT_GDT;
    sregs.gdt.limit = u16::try_from(size_of_val(&GDT) - 1).unwrap_or(0);
    memory
        .write_obj(0_u64, GuestAddress(layout::BOOT_IDT))
        .map_err(BootError::Memory)?;
    sregs.idt.base = layout::BOOT_IDT;
    sregs.idt.limit = u16::try_from(size_of::<u64>() - 1).unwrap_or(0);
    Ok(())
}

fn set_segments(sregs: &mut kvm_sregs, code: &Descriptor) {
    sregs.cs = flat(code);
    let data = flat(&DATA);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        selector: TSS_SELECTOR,
        limit: TSS_LIMIT,
        type_: TSS_TYPE,
        present: 1,
        ..Default::default()
    };
}

/// A segment over all of memory.
fn flat(descriptor: &Descriptor) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: descriptor.selector,
        type_: descriptor.type_,
        present: 1,
        dpl: 0,
        db: u8::from(!descriptor.long),
        s: 1,
        l: u8::from(descriptor.long),
        g: 1,
        ..Default::default()
    }
}

/// Maps the first 4 GiB to themselves with 2 MiB pages.
fn write_page_tables(memory: &GuestMemory) -> Result<(), BootError> {
    let top = layout::BOOT_PAGE_TABLES;
    let pointers = top + PAGE_SIZE;
    let write = |value: u64, address: u64| {
        memory
            .write_obj(value, GuestAddress(address))
            .map_err(BootError::Memory)
    };
    write(pointers | TABLE, top)?;
    for gib in 0..MAPPED_GIB {
        let directory = pointers + PAGE_SIZE * (gib + 1);
        write(directory | TABLE, pointers + gib * 8)?;
        for page in 0..512 {
            write((gib << 30) | (page << 21) | LEAF_2M, directory + page * 8)?;
        }
    }
    Ok(())
}
