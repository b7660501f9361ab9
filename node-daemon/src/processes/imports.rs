//! Filling disks: starts one `bascule-import` for each, which outlives the daemon.

use std::ffi::OsString;
use std::fs;

use anyhow::{Context, Result};
use bascule_ipc::volume::{Request, Response};
use bascule_node_api::command::{ImportSource, Outcome, RejectReason};
use bascule_node_api::report::{ImportReport, ImportState};
use bascule_types::{Bytes, DiskId, Epoch, Owner, VmUid};

use super::calls::volume_call;
use super::supervisor::{Rejection, Supervisor, is_alive};
use crate::files;
use crate::images::{ImportJob, JobSource, write_report};

/// What an import is asked with.
#[derive(Debug)]
pub(crate) struct ImportOrder<'a> {
    pub(crate) volume: &'a str,
    pub(crate) vm: VmUid,
    pub(crate) owner: Owner,
    pub(crate) epoch: Epoch,
    pub(crate) disk: DiskId,
    pub(crate) source: &'a ImportSource,
}

impl Supervisor {
    /// Begins to fill a disk. Asked again while it goes on, or after it is complete, it does
    /// nothing; after a failure it begins anew.
    pub(crate) fn import(&self, order: &ImportOrder<'_>) -> Result<Outcome, Rejection> {
        let report_path = self.paths.import(order.disk);
        if let Some(report) = read_report(&report_path)
            && matches!(
                report.state,
                ImportState::Running | ImportState::Complete { .. }
            )
            && self.import_is_alive_or_done(order.disk, &report)
        {
            return Ok(Outcome::Done);
        }
        let job = ImportJob {
            volume: order.volume.to_owned(),
            socket: self.paths.volume_socket(order.volume),
            vm: order.vm,
            owner: order.owner,
            epoch: order.epoch,
            disk: order.disk,
            source: self.job_source(order.source)?,
            allow_sources: self.allow_sources.clone(),
            report: report_path.clone(),
        };
        let begun = ImportReport {
            volume: order.volume.to_owned(),
            disk: order.disk,
            written: Bytes(0),
            total: None,
            state: ImportState::Running,
        };
        write_report(&report_path, &begun)?;
        let job_path = report_path.with_extension("job");
        let json = serde_json::to_vec_pretty(&job).context("write the job")?;
        files::replace(&job_path, &json, 0o600)?;
        let args: Vec<OsString> = vec!["run".into(), "--job".into(), job_path.into()];
        let log = self.paths.logs().join(format!("import-{}.log", order.disk));
        let child = self.launcher.spawn(
            "bascule-import",
            &format!("import-{}", order.disk),
            &log,
            &args,
        )?;
        let pid_path = report_path.with_extension("pid");
        files::replace(&pid_path, child.id().to_string().as_bytes(), 0o644)?;
        self.adopt_child(child);
        tracing::info!(volume = %order.volume, disk = %order.disk, "import begun");
        Ok(Outcome::Done)
    }

    /// Forgets the imports whose disks are no longer being imported.
    pub(crate) fn remove_finished_imports(&self) -> Result<()> {
        for report in self.import_reports()? {
            if !matches!(report.state, ImportState::Complete { .. }) {
                continue;
            }
            let socket = self.paths.volume_socket(&report.volume);
            let Ok(Response::Rows(rows)) = volume_call(&socket, &Request::Rows) else {
                continue;
            };
            let importing = rows
                .disks
                .iter()
                .any(|row| row.disk == report.disk && row.importing);
            if !importing {
                for extension in ["json", "job", "pid"] {
                    let path = self.paths.import(report.disk).with_extension(extension);
                    // It may be gone already.
                    drop(fs::remove_file(path));
                }
            }
        }
        Ok(())
    }

    fn import_is_alive_or_done(&self, disk: DiskId, report: &ImportReport) -> bool {
        let path = self.paths.import(disk).with_extension("pid");
        let pid = fs::read_to_string(path)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        matches!(report.state, ImportState::Complete { .. }) || pid.is_some_and(is_alive)
    }

    fn job_source(&self, source: &ImportSource) -> Result<JobSource, Rejection> {
        match source {
            ImportSource::Blank => Ok(JobSource::Blank),
            ImportSource::Http { url, sha256 } => Ok(JobSource::Http {
                url: url.clone(),
                sha256: sha256.clone(),
            }),
            ImportSource::HostFile { name } => {
                let path = self.host_files.get(name).ok_or_else(|| {
                    Rejection::new(
                        RejectReason::SourceNotAllowed,
                        format!("hostFile: {name:?} is not on this node's allow-list"),
                    )
                })?;
                Ok(JobSource::File { path: path.clone() })
            }
        }
    }
}

fn read_report(path: &std::path::Path) -> Option<ImportReport> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}
