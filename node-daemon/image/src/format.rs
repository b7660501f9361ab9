//! Formats of files that hold something else than a raw disk, by their magic numbers.
//!
//! File systems, partition tables, ISO 9660, LUKS and squashfs are no entries: a guest uses such bytes as they
//! are. Sources are the formats' own documents and the `file` program's database of magic numbers.

use std::fmt;

use crate::bytes::{at, u64_le};

/// What a file is, if it is no raw disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// As a user calls it, with an article.
    pub name: &'static str,
    /// What kind of file it is.
    pub kind: Kind,
}

/// Kinds of files that are no raw disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A disk image in a hypervisor's format.
    Disk,
    /// A compressed file.
    Compressed,
    /// An archive of files.
    Archive,
    /// An archive as the kernel unpacks it from an initrd.
    Cpio,
}

impl Format {
    /// What a user does to get an image that a disk takes.
    #[must_use]
    pub const fn disk_advice(self) -> &'static str {
        match self.kind {
            Kind::Disk => "convert it with `qemu-img convert -O qcow2`",
            Kind::Compressed => "compress it once, with gzip, xz or zstd",
            Kind::Archive | Kind::Cpio => "publish the image itself instead of an archive",
        }
    }

    /// What a user does to get a kernel.
    #[must_use]
    pub const fn kernel_advice(self) -> &'static str {
        match self.kind {
            Kind::Disk => "take the kernel out of it",
            Kind::Compressed => "decompress it before it is published",
            Kind::Archive | Kind::Cpio => "publish the file itself instead of an archive",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// How an image for a disk is packed, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Its bytes are the disk's.
    Raw,
    /// A qcow2 image of the disk.
    Qcow2,
    /// A compressed file, whose contents are packed in their turn.
    Compressed(Compression),
    /// A format that is not unpacked.
    Foreign(Format),
}

/// Compressions that are unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say all")]
pub enum Compression {
    Gzip,
    Xz,
    Zstd,
}

impl Compression {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Gzip, Self::Xz, Self::Zstd];

    /// As a user calls such a file, without an article.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
        }
    }

    const fn format(self) -> Format {
        match self {
            Self::Gzip => GZIP,
            Self::Xz => XZ,
            Self::Zstd => ZSTD,
        }
    }
}

/// How an image for a disk is packed, by its first [`HEADER_BYTES`].
#[must_use]
pub fn packing(header: &[u8]) -> Packing {
    let Some(format) = by_header(header) else {
        return Packing::Raw;
    };
    if format == QCOW2 {
        return Packing::Qcow2;
    }
    let compression = Compression::ALL
        .into_iter()
        .find(|compression| compression.format() == format);
    compression.map_or(Packing::Foreign(format), Packing::Compressed)
}

/// The format by the first bytes of a file; none of a raw disk. [`HEADER_BYTES`] of them are enough.
#[must_use]
pub fn by_header(header: &[u8]) -> Option<Format> {
    let matches = |magic: &&Magic| {
        let rest = header.get(magic.offset..);
        rest.is_some_and(|rest| rest.starts_with(magic.bytes))
    };
    let found = HEADERS.iter().find(matches).map(|magic| magic.format);
    found.or_else(|| is_lzma(header).then_some(LZMA))
}

/// The format by the last 512 bytes of a file; none of a raw disk.
#[must_use]
pub fn by_footer(footer: &[u8; FOOTER_BYTES]) -> Option<Format> {
    let matches = |magic: &&Magic| footer.starts_with(magic.bytes);
    let found = FOOTERS.iter().find(matches);
    found.map(|magic| magic.format)
}

/// LZMA alone has no magic number: properties 0x5d, a power of two as the dictionary's size, and a length
/// that is unknown or below 2^40.
fn is_lzma(header: &[u8]) -> bool {
    let dictionary = at(header, 1).map(u32::from_le_bytes);
    let length = u64_le(header, 5);
    header.first() == Some(&0x5d)
        && dictionary.is_some_and(|bytes| bytes >= 4096 && bytes.is_power_of_two())
        && length.is_some_and(|bytes| bytes == u64::MAX || (1..1 << 40).contains(&bytes))
}

/// Where a format's magic number is.
struct Magic {
    offset: usize,
    bytes: &'static [u8],
    format: Format,
}

const fn format(kind: Kind, name: &'static str) -> Format {
    Format { name, kind }
}

const fn magic(offset: usize, bytes: &'static [u8], kind: Kind, name: &'static str) -> Magic {
    Magic {
        offset,
        bytes,
        format: format(kind, name),
    }
}

/// The bytes of a file that [`by_header`] looks at.
pub const HEADER_BYTES: usize = 512;
/// The bytes of a file that [`by_footer`] looks at.
pub const FOOTER_BYTES: usize = 512;

const LZMA: Format = format(Kind::Compressed, "an lzma file");
const QCOW2: Format = format(Kind::Disk, "a qcow2 image");
const GZIP: Format = format(Kind::Compressed, "a gzip file");
const XZ: Format = format(Kind::Compressed, "an xz file");
const ZSTD: Format = format(Kind::Compressed, "a zstd file");

const HEADERS: &[Magic] = &[
    // Disk images.
    magic(0, b"QFI\xfb", QCOW2.kind, QCOW2.name),
    magic(0, b"QED\0", Kind::Disk, "a QED image"),
    magic(0, b"KDMV", Kind::Disk, "a VMDK image"),
    magic(0, b"COWD", Kind::Disk, "a VMDK image (ESX)"),
    magic(
        0,
        b"\xbe\xba\xfe\xca\0\0\0\0",
        Kind::Disk,
        "a VMDK image (SE sparse)",
    ),
    magic(
        0,
        b"# Disk DescriptorFile",
        Kind::Disk,
        "a VMDK descriptor, which has no data of its own",
    ),
    magic(0, b"vhdxfile", Kind::Disk, "a VHDX image"),
    magic(0, b"conectix", Kind::Disk, "a VHD image"),
    magic(64, b"\x7f\x10\xda\xbe", Kind::Disk, "a VDI image"),
    magic(0, b"WithoutFreeSpace", Kind::Disk, "a Parallels image"),
    magic(0, b"WithouFreSpacExt", Kind::Disk, "a Parallels image"),
    magic(
        0,
        b"\x3a\xff\x26\xed",
        Kind::Disk,
        "an Android sparse image",
    ),
    magic(0, b"sprs", Kind::Disk, "an Apple sparse image"),
    magic(0, b"shdw", Kind::Disk, "an Apple sparse image (ASIF)"),
    magic(0, b"EVF\x09\x0d\x0a\xff\0", Kind::Disk, "an EWF image"),
    magic(0, b"partclone-image", Kind::Disk, "a partclone image"),
    magic(0, b"MSWIM\0\0\0", Kind::Disk, "a WIM image"),
    // Compressed files.
    magic(0, b"\x1f\x8b\x08", GZIP.kind, GZIP.name),
    magic(0, b"\xfd7zXZ\0", XZ.kind, XZ.name),
    magic(0, b"\x28\xb5\x2f\xfd", ZSTD.kind, ZSTD.name),
    magic(0, b"BZh", Kind::Compressed, "a bzip2 file"),
    magic(0, b"\x04\x22\x4d\x18", Kind::Compressed, "an lz4 file"),
    magic(
        0,
        b"\x02\x21\x4c\x18",
        Kind::Compressed,
        "an lz4 file (legacy)",
    ),
    magic(0, b"LZIP", Kind::Compressed, "an lzip file"),
    magic(0, b"\x89LZO\0", Kind::Compressed, "an lzop file"),
    magic(0, b"\x1f\x9d", Kind::Compressed, "a compress (.Z) file"),
    // Archives.
    magic(257, b"ustar", Kind::Archive, "a tar archive (or OVA)"),
    magic(0, b"PK\x03\x04", Kind::Archive, "a zip archive"),
    magic(0, b"7z\xbc\xaf\x27\x1c", Kind::Archive, "a 7z archive"),
    magic(0, b"Rar!\x1a\x07", Kind::Archive, "a RAR archive"),
    magic(0, b"!<arch>\n", Kind::Archive, "an ar archive"),
    magic(0, b"\xed\xab\xee\xdb", Kind::Archive, "an RPM package"),
    magic(0, b"btrfs-stream\0", Kind::Archive, "a btrfs stream"),
    magic(0, b"070701", Kind::Cpio, "a cpio archive"),
    magic(0, b"070702", Kind::Cpio, "a cpio archive"),
    magic(0, b"070707", Kind::Cpio, "a cpio archive"),
];

const FOOTERS: &[Magic] = &[
    // A fixed VHD is a raw disk with this footer, which would be a part of the disk.
    magic(0, b"conectix", Kind::Disk, "a VHD image"),
    magic(0, b"koly", Kind::Disk, "an Apple disk image"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn file(magic: &Magic) -> Vec<u8> {
        let mut file = vec![0; magic.offset];
        file.extend_from_slice(magic.bytes);
        file.resize(HEADER_BYTES.max(file.len()), 0);
        file
    }

    #[test]
    fn every_format_of_the_table_is_known_by_its_header() {
        for entry in HEADERS {
            assert_eq!(by_header(&file(entry)), Some(entry.format));
        }
    }

    #[test]
    fn what_is_unpacked_is_told_from_what_is_not() {
        assert_eq!(packing(b"QFI\xfb\0\0\0\x03"), Packing::Qcow2);
        assert_eq!(packing(b"a file system"), Packing::Raw);
        assert_eq!(packing(b""), Packing::Raw);
        for (begin, compression) in [
            (b"\x1f\x8b\x08\0".as_slice(), Compression::Gzip),
            (b"\xfd7zXZ\0", Compression::Xz),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
        ] {
            assert_eq!(packing(begin), Packing::Compressed(compression));
        }
        for begin in [b"BZh9".as_slice(), b"KDMV", b"vhdxfile", b"PK\x03\x04"] {
            let packing = packing(begin);
            assert!(matches!(packing, Packing::Foreign(_)), "{packing:?}");
        }
    }

    #[test]
    fn a_short_file_has_no_format() {
        assert_eq!(by_header(b""), None);
        assert_eq!(by_header(b"QF"), None);
        assert_eq!(by_header(&[0; 63]), None);
    }

    #[test]
    fn lzma_is_known_by_plausible_properties() {
        let file = |dictionary: u32, length: u64| {
            let mut file = vec![0x5d];
            file.extend(dictionary.to_le_bytes());
            file.extend(length.to_le_bytes());
            file
        };
        assert_eq!(by_header(&file(1 << 23, u64::MAX)), Some(LZMA));
        assert_eq!(by_header(&file(1 << 23, 1000)), Some(LZMA));
        assert_eq!(by_header(&file(12_345, 1000)), None);
        assert_eq!(by_header(&file(1 << 23, 0)), None);
    }

    #[test]
    fn a_fixed_vhd_and_an_apple_disk_image_are_known_by_their_footers() {
        let footer = |begin: &[u8]| {
            let mut footer = [0; FOOTER_BYTES];
            footer[..begin.len()].copy_from_slice(begin);
            by_footer(&footer).map(|format| format.name)
        };
        assert_eq!(footer(b"conectix"), Some("a VHD image"));
        assert_eq!(footer(b"koly"), Some("an Apple disk image"));
        assert_eq!(footer(b"EFI PART"), None);
    }

    #[test]
    fn what_a_guest_uses_as_it_is_has_no_format() {
        let mut mbr = vec![0; 4096];
        mbr[..2].copy_from_slice(b"\xeb\x63");
        mbr[510..512].copy_from_slice(b"\x55\xaa");
        let mut gpt = mbr.clone();
        gpt[512..520].copy_from_slice(b"EFI PART");
        let mut ext4 = vec![0; 4096];
        ext4[0x438..0x43a].copy_from_slice(b"\x53\xef");
        let mut iso = vec![0; 0x9000];
        iso[0x8001..0x8006].copy_from_slice(b"CD001");
        for raw in [
            mbr,
            gpt,
            ext4,
            iso,
            b"LUKS\xba\xbe\0\x02".to_vec(),
            b"hsqs\0\0\0\0".to_vec(),
            b"XFSB\0\0\x10\0".to_vec(),
            vec![0; 4096],
        ] {
            assert_eq!(by_header(&raw), None, "{:?}", raw.get(..8));
        }
    }
}
