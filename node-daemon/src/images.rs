//! `bascule-import`: fills one disk of a volume from an image.
//!
//! Two processes. The *fetcher* is unprivileged (user nobody, no capabilities, an empty environment,
//! nothing open but a pipe) and speaks to the network: it writes the image's bytes to the pipe. The
//! *writer* has the device and the gate, hashes what it reads from the pipe and writes it to the
//! disk's extents, each write after the gate's check. The disk leaves `importing` only when every
//! byte is flushed, the hash is right and `bascule_image` has refused nothing; whatever the image does
//! not cover reads as zeroes.

mod blocks;
mod fetch;
mod fetcher;
mod final_failure;
mod image_hash;
mod job;
mod length_limit;
mod source_policy;
mod writer;

pub(crate) use fetch::{SiteConfig, fetch};
pub(crate) use final_failure::{FINAL_STATUS, is_final};
pub(crate) use job::{ImportJob, JobSource, write_report};
pub(crate) use writer::{RunArgs, run};
