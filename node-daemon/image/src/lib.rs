//! Judges the bytes of an image while it is imported: which format it has, and whether a kernel can boot.
//!
//! A disk takes raw images only: the guest would see the bytes of a qcow2 file or of an archive as its disk.
//! The importer feeds an image's bytes in order to an [`Inspection`], which refuses a format by its magic as
//! soon as the beginning has arrived, and at the end what only the whole image shows. A refusal is final: the
//! same bytes are refused again.
//!
//! The crate is pure: it must not know files, sockets or the volume. Read next: `format.rs`, the table of
//! formats; `kernel.rs`, the two kinds of kernel that `bascule-vm` boots.

mod bytes;
mod format;
mod inspection;
mod kernel;

pub use format::{FOOTER_BYTES, Format, HEADER_BYTES, Kind, by_footer, by_header};
pub use inspection::{Inspection, Refusal, Role};
pub use kernel::KernelFault;

/// Longest kernel, in bytes: five times a distribution's. The space that is reserved on the volume until the
/// length is known.
pub const KERNEL_BYTES_MAX: u64 = 128 << 20;
/// Longest initrd, in bytes: a generic one with all modules and firmware has less than 300 MiB.
pub const INITRD_BYTES_MAX: u64 = 512 << 20;
