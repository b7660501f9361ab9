//! The PVH boot protocol (Xen, docs/misc/pvh.pandoc).

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{Address, GuestAddress};

use super::error::BootError;
use super::map;
use super::placement::{Entry, load_initrd, no_memory_at, place, write_cmdline};
use super::source::BootSource;
use crate::layout;
use crate::memory::GuestMemory;

/// `XEN_HVM_START_MAGIC_VALUE`.
const START_MAGIC: u32 = 0x336E_C578;
/// With a memory map.
const START_VERSION: u32 = 1;

pub(super) fn load(
    memory: &GuestMemory,
    source: BootSource,
    rsdp: GuestAddress,
) -> Result<Entry, BootError> {
    let loaded = place::<Elf>(memory, &source.kernel)?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvhEntry);
    };
    write_cmdline(memory, &source.cmdline, layout::CMDLINE_SIZE_MAX)?;
    let initrd = load_initrd(memory, source.initrd, loaded.kernel_end, u64::MAX)?;
    let memmap: Vec<_> = map::ranges(memory)
        .into_iter()
        .map(|range| hvm_memmap_table_entry {
            addr: range.start,
            size: range.length,
            type_: range.type_number(),
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = initrd
        .into_iter()
        .map(|(paddr, size)| hvm_modlist_entry {
            paddr,
            size,
            ..Default::default()
        })
        .collect();
    let start_info = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        nr_modules: u32::from(!modules.is_empty()),
        modlist_paddr: if modules.is_empty() {
            0
        } else {
            layout::PVH_MODULES
        },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: rsdp.raw_value(),
        memmap_paddr: layout::PVH_MEMMAP,
        memmap_entries: u32::try_from(memmap.len()).unwrap_or(0),
        ..Default::default()
    };
    let mut params = BootParams::new(&start_info, GuestAddress(layout::PVH_START_INFO));
    params.set_sections(&memmap, GuestAddress(layout::PVH_MEMMAP));
    params.set_modules(&modules, GuestAddress(layout::PVH_MODULES));
    PvhBootConfigurator::write_bootparams(&params, memory)
        .map_err(|_| no_memory_at(layout::PVH_START_INFO))?;
    Ok(Entry::Pvh(entry.raw_value()))
}
