//! ELF files: their CPU, and the note that names the PVH entry.

use super::KernelFault;
use crate::bytes::{u16_le, u32_le, u32_le_as_usize, u64_le};

pub(super) fn is_elf(header: &[u8]) -> bool {
    header.starts_with(b"\x7fELF")
}

/// Refuses an ELF file of another CPU or class.
pub(super) fn check_header(header: &[u8]) -> Result<(), KernelFault> {
    let (class, order) = (header.get(4), header.get(5));
    let machine = u16_le(header, 18).unwrap_or(0);
    let machine = if order == Some(&2) {
        machine.swap_bytes()
    } else {
        machine
    };
    match machine {
        62 if class == Some(&2) => Ok(()),
        3 | 62 => Err(KernelFault::Elf32),
        20 | 21 => Err(KernelFault::OtherCpu("PowerPC")),
        22 => Err(KernelFault::OtherCpu("s390x")),
        40 => Err(KernelFault::OtherCpu("32-bit Arm")),
        183 => Err(KernelFault::OtherCpu("AArch64")),
        243 => Err(KernelFault::OtherCpu("RISC-V")),
        258 => Err(KernelFault::OtherCpu("LoongArch")),
        _ => Err(KernelFault::OtherCpu("another CPU")),
    }
}

/// The notes of an ELF file, collected while the file passes.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    segments: Vec<Segment>,
}

/// A segment of notes: where it is in the file, and its bytes as far as they have arrived.
#[derive(Debug)]
struct Segment {
    begin: u64,
    end: u64,
    alignment: usize,
    bytes: Vec<u8>,
}

impl Notes {
    /// Where the notes of a file with this beginning are; nowhere in a file that is no 64-bit ELF file.
    pub(crate) fn locate(header: &[u8]) -> Self {
        Self {
            segments: segments(header).unwrap_or_default(),
        }
    }

    /// Takes what of the notes is in `bytes`, which begin at `offset` of the file. All of the file passes in
    /// order.
    pub(crate) fn collect(&mut self, offset: u64, bytes: &[u8]) {
        for segment in &mut self.segments {
            let position =
                |at: u64| usize::try_from(at.saturating_sub(offset)).unwrap_or(usize::MAX);
            let (begin, end) = (position(segment.begin), position(segment.end));
            let there = bytes.get(begin.min(bytes.len())..end.min(bytes.len()));
            segment.bytes.extend_from_slice(there.unwrap_or_default());
        }
    }

    pub(crate) fn have_pvh_entry(&self) -> bool {
        self.segments.iter().any(Segment::has_pvh_entry)
    }
}

/// The segments of notes that the program headers name.
fn segments(header: &[u8]) -> Option<Vec<Segment>> {
    if !is_elf(header) {
        return None;
    }
    let table = usize::try_from(u64_le(header, 32)?).ok()?;
    let (size, count) = (u16_le(header, 54)?, u16_le(header, 56)?);
    let mut found = Vec::new();
    for index in 0..usize::from(count) {
        let at = table.checked_add(index * usize::from(size))?;
        let entry = header.get(at..)?;
        if u32_le(entry, 0)? != PT_NOTE {
            continue;
        }
        let (begin, length) = (u64_le(entry, 8)?, u64_le(entry, 32)?.min(SEGMENT_BYTES_MAX));
        let alignment = usize::try_from(u64_le(entry, 48)?).ok()?;
        found.push(Segment {
            begin,
            end: begin.checked_add(length)?,
            alignment: if alignment == 8 { 8 } else { 4 },
            bytes: Vec::new(),
        });
        if found.len() == SEGMENTS_MAX {
            break;
        }
    }
    Some(found)
}

impl Segment {
    /// Whether a note named Xen has the type of a PVH entry. A note is three lengths of 32 bits, then name and
    /// contents, each padded.
    fn has_pvh_entry(&self) -> bool {
        let mut rest = self.bytes.as_slice();
        while let Some((note, next)) = self.first_note(rest) {
            if note {
                return true;
            }
            rest = next;
        }
        false
    }

    /// Whether the first note is that of a PVH entry, and the bytes behind it.
    fn first_note<'n>(&self, notes: &'n [u8]) -> Option<(bool, &'n [u8])> {
        let (name, contents) = (u32_le_as_usize(notes, 0)?, u32_le_as_usize(notes, 4)?);
        let kind = u32_le(notes, 8)?;
        let text = notes.get(12..12_usize.checked_add(name)?)?;
        let padded = |length: usize| length.checked_next_multiple_of(self.alignment);
        let at = padded(12_usize.checked_add(name)?)?;
        let end = padded(at.checked_add(contents)?)?;
        let is_entry = kind == XEN_ELFNOTE_PHYS32_ENTRY && text == b"Xen\0";
        // The last note need not be padded.
        Some((is_entry, notes.get(end..).unwrap_or_default()))
    }
}

const PT_NOTE: u32 = 4;
/// Xen, xen/include/public/elfnote.h.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// Linux has a few hundred bytes of notes in one or two segments.
const SEGMENT_BYTES_MAX: u64 = 1 << 16;
const SEGMENTS_MAX: usize = 16;
