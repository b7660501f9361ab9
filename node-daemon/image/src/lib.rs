//! Judges the bytes of an image while it is imported: which format it has, and whether a kernel can boot.
//!
//! [`packing`] says how a disk's image is packed, and `bascule-image-unpack` unpacks what is. The importer feeds
//! the bytes of a kernel, of an initrd, or of a disk as it is when unpacked, in order to an [`Inspection`],
//! which refuses a format by its magic as soon as the beginning has arrived (the guest would see the bytes of
//! an archive as its disk), and at the end what only the whole image shows. A refusal is final: the same bytes
//! are refused again.
//!
//! The crate is pure: it must not know files, sockets or the volume. Read next: `format.rs`, the table of
//! formats; `qcow2.rs`, which qcow2 images are unpacked; `kernel.rs`, the two kinds of kernel that
//! `bascule-vm` boots.

mod bytes;
mod format;
mod inspection;
mod kernel;
mod qcow2;

pub use format::{
    Compression, FOOTER_BYTES, Format, HEADER_BYTES, Kind, Packing, by_footer, by_header, packing,
};
pub use inspection::{Inspection, Refusal, Role, packed_bytes_max};
pub use kernel::KernelFault;
pub use qcow2::{QCOW2_HEADER_BYTES, Qcow2Fault, Qcow2Header};

/// Longest kernel, in bytes: five times a distribution's. The space that is reserved on the volume until the
/// length is known.
pub const KERNEL_BYTES_MAX: u64 = 128 << 20;
/// Longest initrd, in bytes: a generic one with all modules and firmware has less than 300 MiB.
pub const INITRD_BYTES_MAX: u64 = 512 << 20;
