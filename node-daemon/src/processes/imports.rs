//! Imports: starts one `bascule-import` process per disk to fill. The process outlives the daemon.

use std::ffi::OsString;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use bascule_ipc::volume::{Request, Response};
use bascule_node_api::command::{ImportSource, Outcome, RejectReason};
use bascule_node_api::report::{ImportReport, ImportState};
use bascule_types::{Bytes, DiskId, Epoch, Owner, VmUid};
use rustix::process::{Pid, Signal, kill_process};

use super::calls::volume_call;
use super::supervisor::{Rejection, Supervisor, is_alive};
use crate::files;
use crate::images::{ImportJob, JobSource, write_report};
use crate::wait::wait_for;

/// The parameters of an import.
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
    /// Starts the import of a disk. Does nothing while the import runs or when it is complete;
    /// after a failure it starts the import again.
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
            site: self.image_site.read()?,
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
        tracing::info!(volume = %order.volume, disk = %order.disk, "import started");
        Ok(Outcome::Done)
    }

    /// Removes the files of complete imports whose disks are no longer marked as importing.
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
                self.remove_import_files(report.disk);
            }
        }
        Ok(())
    }

    /// Kills the import process of a disk, if it runs, and removes its files. A write that it has
    /// submitted may still land until the volume's settle time has passed.
    pub(crate) fn cancel_import(&self, disk: DiskId) -> Result<()> {
        if let Some(pid) = self.import_pid(disk).filter(|pid| is_alive(*pid)) {
            kill(pid).context("end the import")?;
            wait_for(CANCEL_LIMIT, || {
                self.reap();
                (!is_alive(pid)).then_some(())
            })
            .with_context(|| format!("the import process {pid} does not end"))?;
        }
        self.remove_import_files(disk);
        Ok(())
    }

    fn remove_import_files(&self, disk: DiskId) {
        for extension in ["json", "job", "pid"] {
            // A file that does not exist needs no removal.
            drop(fs::remove_file(
                self.paths.import(disk).with_extension(extension),
            ));
        }
    }

    fn import_pid(&self, disk: DiskId) -> Option<u32> {
        let path = self.paths.import(disk).with_extension("pid");
        fs::read_to_string(path).ok()?.trim().parse().ok()
    }

    fn import_is_alive_or_done(&self, disk: DiskId, report: &ImportReport) -> bool {
        let pid = self.import_pid(disk);
        matches!(report.state, ImportState::Complete { .. }) || pid.is_some_and(is_alive)
    }

    fn job_source(&self, source: &ImportSource) -> Result<JobSource, Rejection> {
        match source {
            ImportSource::Blank => Ok(JobSource::Blank),
            ImportSource::Http { url, digest } => Ok(JobSource::Http {
                url: url.clone(),
                digest: digest.clone(),
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

fn kill(pid: u32) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(pid)?).context("process id")?;
    match kill_process(pid, Signal::KILL) {
        // The process has ended already.
        Err(rustix::io::Errno::SRCH) => Ok(()),
        done => Ok(done?),
    }
}

fn read_report(path: &std::path::Path) -> Option<ImportReport> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// A killed process ends only when its write in flight has completed.
const CANCEL_LIMIT: Duration = Duration::from_secs(30);
