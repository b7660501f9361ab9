//! What `bascule-node` and `bascule-import` say to each other, as files: the job and its report.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bascule_node_api::report::ImportReport;
use bascule_types::{DiskId, Epoch, ImageDigest, Owner, VmUid};
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
    },
    /// A file of this node, from the administrator's allow-list.
    File { path: PathBuf },
}

/// Replaces the report of an import.
pub(crate) fn write_report(path: &Path, report: &ImportReport) -> Result<()> {
    let json = serde_json::to_vec(report).context("write the import's report")?;
    files::replace(path, &json, 0o644)
}
