//! Unpacks a disk's image: [`Decompressor`] reads gzip, xz and zstd files, [`Qcow2Disk`] reads qcow2 images.
//!
//! All of the bytes are hostile. What they can do is bounded: the memory by [`MEMORY_BYTES_MAX`] and the tables
//! of a qcow2 image (32 MiB for the first level; 8 bytes for each cluster of the disk, at most 256 MiB, for the
//! second), the output by the caller, who stops reading. The crate reads from what it is given and opens no
//! file: a qcow2 image cannot name another one. It must not know the network or the volume, and its user
//! runs it in a process that has neither.
//!
//! Read next: `decompressor.rs`; `disk.rs`, which puts the checks of `bascule-image` around the library that
//! reads the clusters. Why these libraries: ADR 11.

#![forbid(unsafe_code)]

mod decompressor;
mod disk;
mod zstd_frames;

pub use decompressor::Decompressor;
pub use disk::{DiskError, Piece, Qcow2Disk};

/// The most memory in bytes that a compressed file may need to be read: its dictionary or window. What `xz -9`
/// (64 MiB) and `zstd --long` (128 MiB) write can be read; `zstd -d` has the same limit.
pub const MEMORY_BYTES_MAX: u64 = 128 << 20;
