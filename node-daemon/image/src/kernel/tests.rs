//! Kernels of every kind, as small as their headers allow.

use super::*;
use crate::inspection::{Inspection, Refusal, Role};

/// A bzImage of boot protocol 2.15 with a 64-bit entry.
pub(crate) fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 5 * 512 + 4096];
    image[..2].copy_from_slice(b"MZ");
    image[0x1f1] = 4;
    image[0x1f4..0x1f8].copy_from_slice(&256_u32.to_le_bytes());
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    image[0x236] = 1;
    image
}

/// An x86-64 ELF file whose notes, with a PVH entry as the second, are at `notes`.
pub(crate) fn pvh_elf(notes: usize) -> Vec<u8> {
    let note = |name: &[u8; 4], kind: u32| {
        let mut note = Vec::new();
        for number in [4, 4, kind] {
            note.extend(number.to_le_bytes());
        }
        note.extend(name);
        note.extend([0, 0, 0, 1]);
        note
    };
    let contents = [note(b"GNU\0", 3), note(b"Xen\0", 18)].concat();
    let mut image = elf(62, 1);
    image.resize(notes + contents.len() + 100, 0);
    image[64..68].copy_from_slice(&4_u32.to_le_bytes());
    image[72..80].copy_from_slice(&(notes as u64).to_le_bytes());
    image[96..104].copy_from_slice(&(contents.len() as u64).to_le_bytes());
    image[112] = 4;
    image[notes..notes + contents.len()].copy_from_slice(&contents);
    image
}

/// A 64-bit ELF file with so many empty program headers.
fn elf(machine: u16, headers: u16) -> Vec<u8> {
    let mut image = vec![0; 64 + 56 * usize::from(headers)];
    image[..6].copy_from_slice(b"\x7fELF\x02\x01");
    image[18..20].copy_from_slice(&machine.to_le_bytes());
    image[32] = 64;
    image[54] = 56;
    image[56..58].copy_from_slice(&headers.to_le_bytes());
    image
}

/// An EFI program for a CPU, with one section.
fn efi(machine: u16, section: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 4096];
    image[..2].copy_from_slice(b"MZ");
    image[0x3c] = 0x80;
    image[0x80..0x84].copy_from_slice(b"PE\0\0");
    image[0x84..0x86].copy_from_slice(&machine.to_le_bytes());
    image[0x86] = 1;
    image[0x94] = 0xf0;
    let table = 0x80 + 24 + 0xf0;
    image[table..table + section.len()].copy_from_slice(section);
    image
}

fn inspect(kernel: &[u8]) -> Result<(), Refusal> {
    let mut inspection = Inspection::new(Role::Kernel);
    inspection.feed(kernel)?;
    inspection.finish()
}

fn fault(kernel: &[u8]) -> KernelFault {
    match inspect(kernel) {
        Err(Refusal::Kernel(fault)) => fault,
        other => panic!("{other:?}"),
    }
}

/// Seen as five crashes of a guest with growing back-off.
#[test]
fn a_unified_kernel_image_is_named_as_such() {
    assert_eq!(fault(&efi(0x8664, b".linux")), KernelFault::Unified);
    assert_eq!(fault(&efi(0x8664, b".text")), KernelFault::Efi);
}

#[test]
fn kernels_of_other_cpus_are_refused_in_every_format() {
    let raw = |offset: usize, magic: &[u8]| {
        let mut image = vec![0; 4096];
        image[offset..offset + magic.len()].copy_from_slice(magic);
        image
    };
    for (image, cpu) in [
        (elf(183, 0), "AArch64"),
        (elf(243, 0), "RISC-V"),
        (elf(22_u16.swap_bytes(), 0), "another CPU"),
        (raw(56, b"ARM\x64"), "AArch64"),
        (raw(56, b"RSC\x05"), "RISC-V"),
        (raw(0x24, b"\x18\x28\x6f\x01"), "32-bit Arm"),
        (efi(0xaa64, b".linux"), "AArch64"),
        (efi(0x5064, b".text"), "RISC-V"),
        (efi(0x014c, b".text"), "32-bit x86"),
    ] {
        assert_eq!(fault(&image), KernelFault::OtherCpu(cpu));
    }
    let mut big_endian = elf(22_u16.swap_bytes(), 0);
    big_endian[5] = 2;
    assert_eq!(fault(&big_endian), KernelFault::OtherCpu("s390x"));
}

#[test]
fn a_kernel_without_an_entry_that_we_use_is_refused() {
    let mut old = bzimage();
    old[0x206..0x208].copy_from_slice(&0x0209_u16.to_le_bytes());
    assert_eq!(fault(&old), KernelFault::No64BitEntry);
    let mut narrow = bzimage();
    narrow[0x236] = 0;
    assert_eq!(fault(&narrow), KernelFault::No64BitEntry);
    assert_eq!(fault(&elf(62, 1)), KernelFault::NoPvhEntry);
    let mut elf32 = elf(3, 0);
    elf32[4] = 1;
    assert_eq!(fault(&elf32), KernelFault::Elf32);
}

#[test]
fn a_bzimage_that_was_cut_off_is_refused() {
    let mut image = bzimage();
    image.truncate(3000);
    let (expected, found) = (5 * 512 + 4096, 3000);
    assert_eq!(fault(&image), KernelFault::Truncated { expected, found });
}

#[test]
fn compressed_and_packed_kernels_are_named() {
    let gzip = fault(b"\x1f\x8b\x08\0\0\0").to_string();
    assert!(gzip.contains("a gzip file"), "{gzip}");
    assert_eq!(fault(b"\x27\x05\x19\x56"), KernelFault::UBoot);
    assert_eq!(fault(b"\xd0\x0d\xfe\xed"), KernelFault::DeviceTree);
    assert_eq!(fault(b"MZ\0\0zimg"), KernelFault::Zboot);
}

#[test]
fn an_unrecognized_file_is_refused_only_at_its_end() {
    let page = b"<!DOCTYPE html><title>Not found</title>";
    assert_eq!(check_header(page), Ok(()));
    assert_eq!(fault(page), KernelFault::NotAKernel);
    assert_eq!(fault(b""), KernelFault::NotAKernel);
}

/// No length or offset in a file is trusted.
#[test]
fn cut_and_overwritten_kernels_make_no_panic() {
    for image in [bzimage(), pvh_elf(0x200), efi(0x8664, b".linux")] {
        let lengths = 0..image.len().min(1024);
        let taken = |cut: &usize| inspect(&image[..*cut]).is_ok();
        assert!(lengths.clone().filter(taken).count() < lengths.len());
        let hostile = |at: &usize| {
            let mut hostile = image.clone();
            let end = (at + 8).min(hostile.len());
            hostile[*at..end].fill(0xff);
            inspect(&hostile).is_ok()
        };
        assert!(lengths.clone().filter(hostile).count() < lengths.len());
    }
}
