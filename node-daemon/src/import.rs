//! `bascule-import`: fills one disk of a volume from an image.
//!
//! Two processes. The *fetcher* is unprivileged (user nobody, no capabilities, an empty environment,
//! nothing open but a pipe) and speaks to the network: it writes the image's bytes to the pipe. The
//! *writer* has the device and the gate, hashes what it reads from the pipe and writes it to the
//! disk's extents, each write after the gate's check. The disk leaves `importing` only when every
//! byte is flushed and the hash is right; whatever the image does not cover reads as zeroes.

mod blocks;
mod fetch;
mod fetcher;
mod writer;

use std::path::PathBuf;

use bascule_types::{DiskId, Epoch, Owner, VmUid};
use serde::{Deserialize, Serialize};

pub(crate) use fetch::{FetchArgs, fetch};
pub(crate) use writer::{RunArgs, run};

/// One import, as `bascule-node` writes it down for the writer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImportJob {
    /// The SharedVolume's name, for the report.
    pub(crate) volume: String,
    /// The socket of its `bascule-volume`.
    pub(crate) socket: PathBuf,
    /// The VM, whose row this node owns.
    pub(crate) vm: VmUid,
    /// This node's slot and generation.
    pub(crate) owner: Owner,
    /// The row's epoch.
    pub(crate) epoch: Epoch,
    /// The disk to fill.
    pub(crate) disk: DiskId,
    /// Where its contents come from.
    pub(crate) source: JobSource,
    /// Address ranges that may be fetched from although they are loopback or link-local.
    pub(crate) allow_sources: Vec<String>,
    /// Where to report.
    pub(crate) report: PathBuf,
}

/// Where a disk's contents come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum JobSource {
    /// Nothing: zeroes.
    Blank,
    /// A file by http or https, with its SHA-256 in hex.
    Http { url: String, sha256: String },
    /// A file of this node, from the administrator's allow-list.
    File { path: PathBuf },
}
