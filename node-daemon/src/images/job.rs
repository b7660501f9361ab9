//! What `bascule-node` and `bascule-import` say to each other, as files: the job and its report.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bascule_node_api::report::{ImportReport, ImportState};
use bascule_types::{Bytes, DiskId, Epoch, ImageDigest, Owner, SecretKey, VmUid};
use serde::{Deserialize, Serialize};

use super::fetch::SiteConfig;
use crate::files;

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
    /// The number of the attempt, for the report.
    pub(crate) attempt: u32,
    /// Where its contents come from.
    pub(crate) source: JobSource,
    /// How this node reaches image sources.
    pub(crate) site: SiteConfig,
    /// Where to report.
    pub(crate) report: PathBuf,
    /// The folder for an image that must be whole before it can be read.
    pub(crate) spool: PathBuf,
}

/// How far an import is.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Progress {
    /// Bytes of the image that have come.
    pub(crate) downloaded: Bytes,
    /// Bytes of the disk, from its beginning, that are filled.
    pub(crate) written: Bytes,
}

/// Where a disk's contents come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum JobSource {
    /// Nothing: zeroes.
    Blank,
    /// A file by http or https.
    Http {
        url: String,
        digest: ImageDigest,
        /// Certificate authorities to trust beside the site's, in PEM.
        ca_bundle: Option<String>,
        /// The Secret with the value of the header Authorization. The value is not in the job's file: the writer
        /// gets it on standard input.
        #[serde(default)]
        authorization_from: Option<SecretKey>,
    },
    /// A file of this node, from the administrator's allow-list.
    File { path: PathBuf },
}

/// Reports where an import stands.
pub(crate) fn report(job: &ImportJob, progress: Progress, state: ImportState) -> Result<()> {
    let total = match state {
        ImportState::Complete { length } => Some(length),
        ImportState::Running | ImportState::Failed { .. } => None,
    };
    let report = ImportReport {
        volume: job.volume.clone(),
        disk: job.disk,
        attempt: job.attempt,
        downloaded: progress.downloaded,
        written: progress.written,
        total,
        state,
    };
    write_report(&job.report, &report)
}

/// Replaces the report of an import.
pub(crate) fn write_report(path: &Path, report: &ImportReport) -> Result<()> {
    let json = serde_json::to_vec(report).context("write the import's report")?;
    files::replace(path, &json, 0o644)
}
