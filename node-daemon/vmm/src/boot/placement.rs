//! Placing kernel, command line and initrd in guest memory, for every kind of kernel.

use std::io::{Cursor, Read as _};

use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes as _, GuestAddress};

use super::error::BootError;
use super::map;
use super::source::Initrd;
use crate::layout;
use crate::memory::{GuestMemory, PAGE_SIZE};

/// The boot processor's entry point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// 32-bit protected mode, EBX = `hvm_start_info`.
    Pvh(u64),
    /// Long mode, RSI = `boot_params`.
    Linux64(u64),
}

/// Loads a kernel with the loader `L`, at or above 1 MiB.
pub(super) fn place<L: KernelLoader>(
    memory: &GuestMemory,
    kernel: &[u8],
) -> Result<KernelLoaderResult, BootError> {
    let himem = Some(GuestAddress(layout::HIMEM_START));
    L::load(memory, None, &mut Cursor::new(kernel), himem).map_err(BootError::Load)
}

/// The error for guest memory that ends before the boot structure at `address`.
pub(super) fn no_memory_at(address: u64) -> BootError {
    let at = GuestAddress(address);
    BootError::Memory(vm_memory::GuestMemoryError::InvalidGuestAddress(at))
}

/// Writes the command line, at most `max` bytes and a NUL.
pub(super) fn write_cmdline(
    memory: &GuestMemory,
    cmdline: &str,
    max: usize,
) -> Result<(), BootError> {
    let max = max.min(layout::CMDLINE_SIZE_MAX - 1);
    if cmdline.len() > max || cmdline.contains('\0') {
        return Err(BootError::Cmdline {
            length: cmdline.len(),
            max,
        });
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(layout::CMDLINE))
        .map_err(BootError::Memory)
}

/// Reads the initrd to the top of low memory, above `kernel_end` and the boot structures, and below `limit`.
pub(super) fn load_initrd(
    memory: &GuestMemory,
    initrd: Option<Initrd>,
    kernel_end: u64,
    limit: u64,
) -> Result<Option<(u64, u64)>, BootError> {
    let Some(Initrd {
        length,
        mut content,
    }) = initrd
    else {
        return Ok(None);
    };
    let too_large = BootError::InitrdTooLarge { length };
    let low_end = map::low_ram_end(memory).min(limit);
    let start = low_end
        .checked_sub(length)
        .map(|start| start / PAGE_SIZE * PAGE_SIZE);
    let floor = kernel_end.max(layout::HIMEM_START);
    let Some(start) = start.filter(|start| *start >= floor) else {
        return Err(too_large);
    };
    let mut buffer = vec![0; COPY_BYTES];
    let mut done = 0;
    while done < length {
        let step = usize::try_from(length - done)
            .unwrap_or(usize::MAX)
            .min(COPY_BYTES);
        let chunk = buffer.get_mut(..step).unwrap_or_default();
        content.read_exact(chunk).map_err(BootError::InitrdRead)?;
        memory
            .write_slice(chunk, GuestAddress(start + done))
            .map_err(BootError::Memory)?;
        done += u64::try_from(step).unwrap_or(u64::MAX);
    }
    Ok(Some((start, length)))
}

/// Bytes of an initrd that are copied at once.
const COPY_BYTES: usize = 1 << 20;
