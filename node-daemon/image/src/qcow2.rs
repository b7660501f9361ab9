//! Which qcow2 images are unpacked, by their header and their L1 table.
//!
//! Sources: QEMU, docs/interop/qcow2.rst; its limits, in QEMU's block/qcow2.h. All numbers are big-endian. An
//! image stands for itself: one that needs another file (a backing file, an external data file) is refused
//! here, before any library reads it. Read next: `disk.rs` of `bascule-image-unpack`, which reads the clusters.

use crate::bytes::{u32_be, u64_be};

/// Why a qcow2 image is not unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the texts say all")]
pub enum Qcow2Fault {
    #[error("is truncated: it has {found} bytes, and its header {needed}")]
    NoHeader { needed: usize, found: usize },
    #[error("has the version {0}, and 2 and 3 are known")]
    Version(u32),
    #[error(
        "has a backing file (header field backing_file_offset), which is never read: flatten it with `qemu-img \
         convert -O qcow2`"
    )]
    BackingFile,
    #[error(
        "has an external data file (header field incompatible_features, bit 2), which is never read: make it \
         whole with `qemu-img convert -O qcow2`"
    )]
    ExternalDataFile,
    #[error(
        "is encrypted (header field crypt_method is {0}): decrypt it with `qemu-img convert`, or encrypt within \
         the guest"
    )]
    Encrypted(u32),
    #[error(
        "was not closed (header field incompatible_features, bit 0): repair it with `qemu-img check -r all`"
    )]
    Dirty,
    #[error("is marked as corrupt (header field incompatible_features, bit 1)")]
    Corrupt,
    #[error(
        "has clusters that are not compressed with zlib (header fields incompatible_features, bit 3, and \
         compression_type): convert it with `qemu-img convert -O qcow2`, or compress the whole file instead"
    )]
    CompressionType,
    #[error(
        "has extended L2 entries (header field incompatible_features, bit 4): convert it with `qemu-img convert \
         -O qcow2`"
    )]
    ExtendedL2,
    #[error("needs features that are not known (header field incompatible_features is {0:#x})")]
    UnknownFeatures(u64),
    #[error("has the header field {field} = {value}, which {rule}")]
    Field {
        field: &'static str,
        value: u64,
        rule: &'static str,
    },
    #[error("is a disk of {virtual_size} bytes (header field size), and the disk here has {disk}")]
    LargerThanDisk { virtual_size: u64, disk: u64 },
    #[error("has an L1 table of {found} entries (header field l1_size), and {needed} are needed")]
    L1TooSmall { needed: u64, found: u64 },
    #[error(
        "is truncated: its {what} at byte {offset} is not within the file, which has {file} bytes"
    )]
    Outside {
        what: &'static str,
        offset: u64,
        file: u64,
    },
    #[error("is damaged: entry {0} of its L1 table is not the address of a cluster")]
    L1Entry(usize),
}

/// What of a qcow2 header is needed, after it was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Qcow2Header {
    /// The disk's size in bytes.
    pub virtual_size: u64,
    /// Log2 of the size of a cluster in bytes: 9 to 21.
    pub cluster_bits: u32,
    /// Entries of the L1 table, of 8 bytes each; at most 32 MiB of them.
    pub l1_entries: u32,
    /// Where the L1 table is in the file, in bytes.
    pub l1_offset: u64,
}

impl Qcow2Header {
    /// Reads the header from the beginning of a file: [`QCOW2_HEADER_BYTES`], or all of a shorter one.
    ///
    /// # Errors
    /// The image is broken, or of a kind that is not unpacked.
    pub fn parse(head: &[u8]) -> Result<Self, Qcow2Fault> {
        let number = |at| u32_be(head, at).ok_or_else(|| short(V2_BYTES, head));
        let long = |at| u64_be(head, at).ok_or_else(|| short(V2_BYTES, head));
        let version = number(4)?;
        let cluster_bits = number(20)?;
        let header = Self {
            virtual_size: long(24)?,
            cluster_bits,
            l1_entries: number(36)?,
            l1_offset: long(40)?,
        };
        // The last field of version 2.
        long(64)?;
        if !(2..=3).contains(&version) {
            return Err(Qcow2Fault::Version(version));
        }
        if long(8)? != 0 {
            return Err(Qcow2Fault::BackingFile);
        }
        match number(32)? {
            0 => {}
            method => return Err(Qcow2Fault::Encrypted(method)),
        }
        if !(9..=21).contains(&cluster_bits) {
            let rule = "is not between 9 and 21";
            return Err(field("cluster_bits", cluster_bits.into(), rule));
        }
        if version == 3 {
            check_v3(head, 1 << cluster_bits)?;
        }
        let unaligned = |offset: u64| offset & ((1 << cluster_bits) - 1) != 0;
        let reftable = long(48)?;
        for (name, offset) in [
            ("l1_table_offset", header.l1_offset),
            ("refcount_table_offset", reftable),
        ] {
            if unaligned(offset) || offset > OFFSET_MAX {
                return Err(field(name, offset, "is not the address of a cluster"));
            }
        }
        header.check_l1_size()?;
        Ok(header)
    }

    /// Refuses an image that is larger than the disk of `disk` bytes.
    ///
    /// # Errors
    /// It is larger.
    pub const fn check_size(&self, disk: u64) -> Result<(), Qcow2Fault> {
        let virtual_size = self.virtual_size;
        if virtual_size > disk {
            return Err(Qcow2Fault::LargerThanDisk { virtual_size, disk });
        }
        Ok(())
    }

    /// The length of the L1 table in bytes: at most 32 MiB.
    #[must_use]
    pub const fn l1_bytes(&self) -> u64 {
        self.l1_entries as u64 * 8
    }

    /// Checks that a file of `file` bytes contains the L1 table.
    ///
    /// # Errors
    /// It does not.
    pub const fn check_file(&self, file: u64) -> Result<(), Qcow2Fault> {
        let end = self.l1_offset.saturating_add(self.l1_bytes());
        if end > file {
            return Err(outside("L1 table", self.l1_offset, file));
        }
        Ok(())
    }

    /// Checks that a file of `file` bytes contains all L2 tables that the L1 table `l1` names. A table that is
    /// not there would be read as zeroes, and so its clusters.
    ///
    /// # Errors
    /// An entry is no address of a cluster, or of one behind the end.
    pub fn check_l1(&self, l1: &[u8], file: u64) -> Result<(), Qcow2Fault> {
        let cluster = 1 << self.cluster_bits;
        let (entries, _) = l1.as_chunks::<8>();
        for (index, entry) in entries.iter().enumerate() {
            let offset = u64::from_be_bytes(*entry) & L1_OFFSET;
            if offset & (cluster - 1) != 0 {
                return Err(Qcow2Fault::L1Entry(index));
            }
            if offset + cluster > file && offset != 0 {
                return Err(outside("L2 table", offset, file));
            }
        }
        Ok(())
    }

    fn check_l1_size(&self) -> Result<(), Qcow2Fault> {
        if self.l1_bytes() > L1_BYTES_MAX {
            let rule = "is more than 4194304";
            return Err(field("l1_size", self.l1_entries.into(), rule));
        }
        // An L2 table is a cluster of entries of 8 bytes.
        let table_bits = 2 * self.cluster_bits - 3;
        let needed = self.virtual_size.div_ceil(1 << table_bits);
        let found = u64::from(self.l1_entries);
        if found < needed {
            return Err(Qcow2Fault::L1TooSmall { needed, found });
        }
        Ok(())
    }
}

/// Checks the fields that only version 3 has.
fn check_v3(head: &[u8], cluster: u64) -> Result<(), Qcow2Fault> {
    let number = |at| u32_be(head, at).ok_or_else(|| short(V3_BYTES, head));
    let incompatible = u64_be(head, 72).ok_or_else(|| short(V3_BYTES, head))?;
    let (refcount_order, header_length) = (number(96)?, number(100)?);
    for (bit, fault) in [
        (2, Qcow2Fault::ExternalDataFile),
        (0, Qcow2Fault::Dirty),
        (1, Qcow2Fault::Corrupt),
        (3, Qcow2Fault::CompressionType),
        (4, Qcow2Fault::ExtendedL2),
    ] {
        if incompatible & (1 << bit) != 0 {
            return Err(fault);
        }
    }
    if incompatible != 0 {
        return Err(Qcow2Fault::UnknownFeatures(incompatible));
    }
    if refcount_order > 6 {
        return Err(field(
            "refcount_order",
            refcount_order.into(),
            "is more than 6",
        ));
    }
    let length = u64::from(header_length);
    if length < V3_BYTES as u64 || length > cluster || length % 8 != 0 {
        let rule = "is no multiple of 8 between 104 and the size of a cluster";
        return Err(field("header_length", length, rule));
    }
    let has_compression_type = header_length > 104;
    if has_compression_type && head.get(104).is_some_and(|kind| *kind != 0) {
        return Err(Qcow2Fault::CompressionType);
    }
    Ok(())
}

const fn short(needed: usize, head: &[u8]) -> Qcow2Fault {
    let found = head.len();
    Qcow2Fault::NoHeader { needed, found }
}

const fn field(field: &'static str, value: u64, rule: &'static str) -> Qcow2Fault {
    Qcow2Fault::Field { field, value, rule }
}

const fn outside(what: &'static str, offset: u64, file: u64) -> Qcow2Fault {
    Qcow2Fault::Outside { what, offset, file }
}

/// The bytes of a file that [`Qcow2Header::parse`] looks at.
pub const QCOW2_HEADER_BYTES: usize = 112;
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;
/// QEMU's limit (QCOW_MAX_L1_SIZE).
const L1_BYTES_MAX: u64 = 32 << 20;
/// The offset within an entry of the L1 table: bits 9 to 55.
const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// An offset in a file has 56 bits.
const OFFSET_MAX: u64 = L1_OFFSET;

#[cfg(test)]
mod tests;
