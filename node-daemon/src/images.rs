//! `bascule-import`: fills one disk of a volume from an image.
//!
//! Three kinds of processes. The *fetcher* speaks to the network, and writes the image's bytes to a pipe. The
//! *unpacker*, which only a compressed image or a qcow2 image needs, reads these hostile bytes; it can open
//! neither a file nor a socket. Both are unprivileged (user nobody, no capabilities, an empty environment,
//! nothing open but pipes, and for an unpacker the image). The *writer* has the device and the gate, hashes
//! what it reads from the fetcher's pipe and writes what it reads from it, or from the unpacker's, to the
//! disk's extents, each write after the gate's check. The disk leaves `importing` only when every byte is
//! flushed, the hash is right and nothing has refused the image; whatever the image does not cover reads as
//! zeroes. Read next: `unpacking.rs`.

mod blocks;
mod download;
mod fetch;
mod fetcher;
mod filler;
mod final_failure;
mod image_hash;
mod job;
mod length_limit;
mod pieces;
mod pump;
mod read_full;
mod source_policy;
mod spool;
mod unpack;
mod unpacker;
mod unpacking;
mod worker;
mod writer;
mod zeroes;

pub(crate) use fetch::{SiteConfig, fetch};
pub(crate) use final_failure::{FINAL_STATUS, is_final};
pub(crate) use job::{ImportJob, JobSource, write_report};
pub(crate) use unpack::{UnpackArgs, unpack};
pub(crate) use writer::{RunArgs, run};
