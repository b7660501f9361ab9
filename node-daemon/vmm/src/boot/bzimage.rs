//! The Linux 64-bit boot protocol (Documentation/arch/x86/boot.rst).

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::KernelLoaderResult;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{Address, GuestAddress};

use super::error::BootError;
use super::map;
use super::placement::{Entry, load_initrd, no_memory_at, place, write_cmdline};
use super::source::BootSource;
use crate::layout;
use crate::memory::GuestMemory;

/// `type_of_loader` of a loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xFF;
/// Offset of the 64-bit entry in the protected-mode kernel.
const ENTRY_64_OFFSET: u64 = 0x200;
/// `XLF_KERNEL_64` of `xloadflags`.
const XLF_KERNEL_64: u16 = 1;
/// Oldest boot protocol that has `xloadflags` and `init_size`.
const PROTOCOL_MIN: u16 = 0x020C;
/// Unit of `syssize`.
const PARAGRAPH_BYTES: u64 = 16;
/// Unit of `setup_sects`.
const SECTOR_BYTES: u64 = 512;

pub(super) fn load(
    memory: &GuestMemory,
    source: BootSource,
    rsdp: GuestAddress,
) -> Result<Entry, BootError> {
    let loaded = place::<BzImage>(memory, &source.kernel)?;
    let Some(header) = loaded.setup_header else {
        return Err(BootError::NotAKernel);
    };
    check_header(&header, source.kernel.len())?;
    write_cmdline(
        memory,
        &source.cmdline,
        usize::try_from(header.cmdline_size).unwrap_or(0),
    )?;
    let kernel_end = kernel_end(&loaded, &header);
    // The highest address that the initrd's last byte may have.
    let limit = u64::from(header.initrd_addr_max) + 1;
    let initrd = load_initrd(memory, source.initrd, kernel_end, limit)?;
    let params = zero_page(memory, header, initrd, rsdp);
    let params = BootParams::new(&params, GuestAddress(layout::ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&params, memory)
        .map_err(|_| no_memory_at(layout::ZERO_PAGE))?;
    Ok(Entry::Linux64(
        loaded.kernel_load.raw_value() + ENTRY_64_OFFSET,
    ))
}

fn check_header(header: &setup_header, found: usize) -> Result<(), BootError> {
    let (version, flags) = (header.version, header.xloadflags);
    if version < PROTOCOL_MIN || flags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry);
    }
    let sectors = match header.setup_sects {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let expected = (sectors + 1) * SECTOR_BYTES + u64::from(header.syssize) * PARAGRAPH_BYTES;
    let found = u64::try_from(found).unwrap_or(u64::MAX);
    // The header counts whole paragraphs.
    if found + PARAGRAPH_BYTES <= expected {
        return Err(BootError::Truncated { expected, found });
    }
    Ok(())
}

/// The end of what the kernel overwrites while it unpacks itself, where it is loaded or where it
/// prefers to be.
fn kernel_end(loaded: &KernelLoaderResult, header: &setup_header) -> u64 {
    let start = loaded.kernel_load.raw_value().max(header.pref_address);
    loaded
        .kernel_end
        .max(start.saturating_add(u64::from(header.init_size)))
}

fn zero_page(
    memory: &GuestMemory,
    header: setup_header,
    initrd: Option<(u64, u64)>,
    rsdp: GuestAddress,
) -> boot_params {
    let mut params = boot_params {
        hdr: header,
        ..Default::default()
    };
    params.acpi_rsdp_addr = rsdp.raw_value();
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = u32::try_from(layout::CMDLINE).unwrap_or(0);
    // Without an initrd 0, whatever the file's header says. Low memory ends below 4 GiB, so both fit.
    let (start, length) = initrd.unwrap_or_default();
    params.hdr.ramdisk_image = u32::try_from(start).unwrap_or(0);
    params.hdr.ramdisk_size = u32::try_from(length).unwrap_or(0);
    let ranges = map::ranges(memory);
    params.e820_entries = u8::try_from(ranges.len()).unwrap_or(0);
    let mut table = params.e820_table;
    for (entry, range) in table.iter_mut().zip(ranges) {
        *entry = boot_e820_entry {
            addr: range.start,
            size: range.length,
            r#type: range.type_number(),
        };
    }
    params.e820_table = table;
    params
}
