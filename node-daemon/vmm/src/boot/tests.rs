use std::io::{self, Cursor};

use bascule_types::Bytes;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::testing::{COUNTER, elf};

const RSDP: GuestAddress = GuestAddress(layout::ACPI_START);

fn boot(kernel: Vec<u8>, initrd: Option<Vec<u8>>, cmdline: &str) -> Result<Entry, BootError> {
    load(&ram(), source(kernel, initrd, cmdline), RSDP)
}

fn ram() -> std::sync::Arc<GuestMemory> {
    crate::memory::create(Bytes::mib(16)).unwrap()
}

fn source(kernel: Vec<u8>, initrd: Option<Vec<u8>>, cmdline: &str) -> BootSource {
    let initrd = initrd.map(|bytes| Initrd {
        length: bytes.len() as u64,
        content: Box::new(Cursor::new(bytes)),
    });
    BootSource {
        kernel,
        initrd,
        cmdline: cmdline.to_owned(),
    }
}

/// A bzImage header with `paragraphs` of kernel behind it, all of them there.
fn bzimage(paragraphs: u32) -> Vec<u8> {
    let mut file = vec![0_u8; 1024];
    file[0x1F1] = 1;
    file[0x1F4..0x1F8].copy_from_slice(&paragraphs.to_le_bytes());
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x020F_u16.to_le_bytes());
    file[0x211] = 1;
    file[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    file[0x22C..0x230].copy_from_slice(&0x7FFF_FFFF_u32.to_le_bytes());
    file[0x236..0x238].copy_from_slice(&1_u16.to_le_bytes());
    file[0x238..0x23C].copy_from_slice(&2047_u32.to_le_bytes());
    file[0x260..0x264].copy_from_slice(&0x20_0000_u32.to_le_bytes());
    file.resize(1024 + paragraphs as usize * 16, 0xCC);
    file
}

#[test]
fn what_is_no_kernel_is_refused_with_the_field_named() {
    for kernel in [vec![], b"MZ".to_vec(), vec![0; 4096], b"\x7fELF".to_vec()] {
        let error = boot(kernel, None, "").unwrap_err();
        assert!(error.to_string().starts_with("boot.kernel: "), "{error}");
    }
    let mut no_note = elf(COUNTER);
    no_note[64 + 56] = 0;
    assert!(matches!(
        boot(no_note, None, ""),
        Err(BootError::NoPvhEntry)
    ));
}

#[test]
fn a_truncated_kernel_is_refused() {
    let mut kernel = bzimage(64);
    kernel.truncate(1500);
    let error = boot(kernel, None, "").unwrap_err();
    assert_eq!(
        error.to_string(),
        "boot.kernel: truncated: 1500 bytes of 2048"
    );
}

#[test]
fn a_command_line_beyond_the_limit_or_with_a_nul_is_refused() {
    for cmdline in ["x".repeat(2048).as_str(), "quiet\0init=/bin/sh"] {
        let error = boot(elf(COUNTER), None, cmdline).unwrap_err();
        assert!(error.to_string().starts_with("boot.cmdline: "), "{error}");
    }
}

#[test]
fn an_initrd_that_does_not_fit_is_refused_before_it_is_read() {
    let initrd = Initrd {
        length: 15 << 20,
        content: Box::new(io::empty()),
    };
    let memory = ram();
    let source = BootSource {
        initrd: Some(initrd),
        ..source(bzimage(64), None, "")
    };
    let error = load(&memory, source, RSDP).unwrap_err();
    assert!(matches!(error, BootError::InitrdTooLarge { .. }), "{error}");
}

/// It used to be placed over the boot structures: an ELF file may have no segment at all to load.
#[test]
fn an_initrd_that_fits_only_over_the_boot_structures_is_refused() {
    let mut kernel = elf(COUNTER);
    // The type of the segment with the code.
    kernel[64] = 0;
    let room = (16 << 20) - usize::try_from(layout::HIMEM_START).unwrap();
    boot(kernel.clone(), Some(vec![7; room]), "a=b").unwrap();
    let error = boot(kernel, Some(vec![7; room + 1]), "a=b").unwrap_err();
    assert!(matches!(error, BootError::InitrdTooLarge { .. }), "{error}");
}

#[test]
fn a_pvh_kernel_finds_its_command_line_initrd_and_memory_map() {
    let memory = ram();
    let entry = load(
        &memory,
        source(elf(COUNTER), Some(vec![7; 5000]), "a=b"),
        RSDP,
    )
    .unwrap();
    assert_eq!(entry, Entry::Pvh(0x10_0000));
    let word = |at: u64| {
        memory
            .read_obj::<u64>(GuestAddress(layout::PVH_START_INFO + at))
            .unwrap()
    };
    assert_eq!(word(0) & 0xFFFF_FFFF, 0x336E_C578);
    let mut cmdline = [0; 4];
    memory
        .read_slice(&mut cmdline, GuestAddress(word(24)))
        .unwrap();
    assert_eq!(&cmdline, b"a=b\0");
    let module: u64 = memory.read_obj(GuestAddress(word(16))).unwrap();
    assert_eq!(
        memory.read_obj::<u8>(GuestAddress(module + 4999)).unwrap(),
        7
    );
    assert_eq!(word(32), RSDP.0);
    let entries = word(48) & 0xFFFF_FFFF;
    assert_eq!(entries, 4);
    let third: u64 = memory
        .read_obj(GuestAddress(word(40) + 2 * 24 + 8))
        .unwrap();
    assert_eq!(third, 15 << 20, "RAM from 1 MiB up");
}

/// The kernel used to find one where its own file said, in memory that nobody had written.
#[test]
fn a_bzimage_without_an_initrd_finds_none_whatever_its_header_says() {
    let mut kernel = bzimage(64);
    kernel[0x218..0x220].fill(0x11);
    let memory = ram();
    load(&memory, source(kernel, None, ""), RSDP).unwrap();
    let at = GuestAddress(layout::ZERO_PAGE + 0x218);
    assert_eq!(memory.read_obj::<u64>(at).unwrap(), 0);
}

#[test]
fn a_bzimage_is_entered_at_its_64_bit_entry_with_a_filled_zero_page() {
    let memory = ram();
    let entry = load(&memory, source(bzimage(64), Some(vec![9; 100]), "ro"), RSDP).unwrap();
    assert_eq!(entry, Entry::Linux64(0x10_0200));
    let at = |offset: u64| GuestAddress(layout::ZERO_PAGE + offset);
    assert_eq!(memory.read_obj::<u64>(at(0x70)).unwrap(), RSDP.0);
    let initrd: u32 = memory.read_obj(at(0x218)).unwrap();
    assert_eq!(
        memory
            .read_obj::<u8>(GuestAddress(u64::from(initrd) + 99))
            .unwrap(),
        9
    );
    assert_eq!(memory.read_obj::<u32>(at(0x21C)).unwrap(), 100);
    assert_eq!(memory.read_obj::<u8>(at(0x1E8)).unwrap(), 4);
    assert_eq!(
        memory.read_obj::<u8>(GuestAddress(0x10_0000)).unwrap(),
        0xCC
    );
}
