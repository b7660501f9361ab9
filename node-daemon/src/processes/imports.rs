//! Imports: starts one `bascule-import` process per disk to fill. The process outlives the daemon.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use bascule_ipc::volume::{Request, Response};
use bascule_node_api::command::{ImportSource, Outcome, RejectReason};
use bascule_node_api::report::{ImportReport, ImportState};
use bascule_types::{Bytes, DiskId, Epoch, HttpAuthorization, Owner, VmUid};
use rustix::process::{Pid, Signal, kill_process};

use super::calls::volume_call;
use super::cgroups::{Share, VMS};
use super::supervisor::{Rejection, Supervisor, is_alive};
use crate::files::{self, names_in};
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
    /// The number of this attempt; none for one more than the last.
    pub(crate) attempt: Option<u32>,
    pub(crate) source: &'a ImportSource,
}

impl Supervisor {
    /// Starts an attempt to import a disk. Does nothing while an attempt runs, when the import is complete, or
    /// when this attempt has failed already. An attempt that cannot begin is reported as failed.
    pub(crate) fn import(&self, order: &ImportOrder<'_>) -> Result<Outcome, Rejection> {
        let _lock = self.lock_imports()?;
        let path = self.paths.import(order.disk);
        let last = self.import_report(&path);
        if let Some(last) = &last
            && match last.state {
                ImportState::Running | ImportState::Complete { .. } => true,
                ImportState::Failed { .. } => order.attempt.is_some_and(|now| now <= last.attempt),
            }
        {
            return Ok(Outcome::Done);
        }
        let last = last.map_or(0, |last| last.attempt);
        let begun = ImportReport {
            volume: order.volume.to_owned(),
            disk: order.disk,
            attempt: order.attempt.unwrap_or_else(|| last.saturating_add(1)),
            downloaded: Bytes(0),
            written: Bytes(0),
            total: None,
            state: ImportState::Running,
        };
        if let Err(error) = self.start_import(order, &begun) {
            let failed = ImportState::Failed {
                message: error.to_string(),
                is_final: false,
            };
            write_report(
                &path,
                &ImportReport {
                    state: failed,
                    ..begun
                },
            )?;
        }
        Ok(Outcome::Done)
    }

    fn start_import(&self, order: &ImportOrder<'_>, begun: &ImportReport) -> Result<(), Rejection> {
        let report_path = self.paths.import(order.disk);
        let spool = self.paths.image_spool();
        fs::create_dir_all(&spool).with_context(|| format!("make {}", spool.display()))?;
        let job = ImportJob {
            volume: order.volume.to_owned(),
            socket: self.paths.volume_socket(order.volume),
            vm: order.vm,
            owner: order.owner,
            epoch: order.epoch,
            disk: order.disk,
            attempt: begun.attempt,
            source: self.job_source(order.source)?,
            site: self.image_site.read()?,
            report: report_path.clone(),
            spool,
        };
        let job_path = report_path.with_extension("job");
        let json = serde_json::to_vec_pretty(&job).context("write the job")?;
        files::replace(&job_path, &json, 0o600)?;
        write_report(&report_path, begun)?;
        let args: Vec<OsString> = vec!["run".into(), "--job".into(), job_path.into()];
        let log = self.paths.logs().join(format!("import-{}.log", order.disk));
        let cgroup = cgroup_name(order.disk);
        let place = (cgroup.as_str(), Share::of_import());
        let program = "bascule-import";
        let child = match authorization(order.source) {
            None => self.launcher.spawn(program, place, &log, &args)?,
            Some(value) => {
                let input = value.reveal().as_bytes();
                let launcher = &self.launcher;
                launcher.spawn_with_input(program, place, &log, &args, input)?
            }
        };
        let pid_path = report_path.with_extension("pid");
        files::replace(&pid_path, child.id().to_string().as_bytes(), 0o644)?;
        self.adopt_child(child);
        let attempt = begun.attempt;
        tracing::info!(volume = %order.volume, disk = %order.disk, attempt, "import started");
        Ok(())
    }

    /// The imports of this node. A process that ended without a last report has failed.
    pub(crate) fn import_reports(&self) -> Result<Vec<ImportReport>> {
        let _lock = self.lock_imports()?;
        let names = names_in(&self.paths.imports())?;
        let reports = names.iter().filter(|name| name.ends_with(".json"));
        Ok(reports
            .filter_map(|name| self.import_report(&self.paths.imports().join(name)))
            .collect())
    }

    /// The report in a file, if there is one. The caller holds the lock on imports, so that a report without a
    /// process is not one that is just being started.
    fn import_report(&self, path: &Path) -> Option<ImportReport> {
        let report = read_report(path)?;
        if report.state != ImportState::Running
            || self.import_pid(report.disk).is_some_and(is_alive)
        {
            return Some(report);
        }
        // It may have written its last report just before it ended.
        let report = read_report(path)?;
        if report.state != ImportState::Running {
            return Some(report);
        }
        let failed = ImportReport {
            state: ImportState::Failed {
                message: KILLED.to_owned(),
                is_final: false,
            },
            ..report
        };
        tracing::warn!(disk = %failed.disk, attempt = failed.attempt, "an import process was killed");
        if let Err(error) = write_report(path, &failed) {
            tracing::warn!(
                error = format!("{error:#}"),
                "cannot write the import's report"
            );
        }
        Some(failed)
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
                let _lock = self.lock_imports()?;
                self.remove_import_files(report.disk);
            }
        }
        Ok(())
    }

    /// [`Self::cancel_import`] for the operator, which repeats it.
    pub(crate) fn cancel_import_soon(&self, disk: DiskId) -> Result<Outcome, Rejection> {
        let ended = self.cancel_import(disk, COMMAND_LIMIT);
        let unresponsive =
            |error| Rejection::new(RejectReason::ProcessUnresponsive, format!("{error:#}"));
        ended.map(|()| Outcome::Done).map_err(unresponsive)
    }

    /// Kills the import process of a disk, if it runs, and its fetcher with it; waits for its end for `limit`,
    /// and removes its files. A write that it has submitted may still land until the volume's settle time has
    /// passed, which the volume waits for before it lets the VM's ownership go.
    pub(crate) fn cancel_import(&self, disk: DiskId, limit: Duration) -> Result<()> {
        if let Some(pid) = self.import_pid(disk).filter(|pid| is_alive(*pid)) {
            kill(pid).context("end the import")?;
            wait_for(limit, || {
                self.reap();
                (!is_alive(pid)).then_some(())
            })
            .with_context(|| format!("the import process {pid} does not end"))?;
        }
        let _lock = self.lock_imports()?;
        self.remove_import_files(disk);
        Ok(())
    }

    /// The caller holds the lock on imports, and the process has ended.
    fn remove_import_files(&self, disk: DiskId) {
        self.launcher.remove_cgroup(&cgroup_name(disk));
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

    fn job_source(&self, source: &ImportSource) -> Result<JobSource, Rejection> {
        match source {
            ImportSource::Blank => Ok(JobSource::Blank),
            ImportSource::Http {
                url,
                digest,
                ca_bundle,
                authorization,
            } => Ok(JobSource::Http {
                url: url.clone(),
                digest: digest.clone(),
                ca_bundle: ca_bundle.clone(),
                authorization_from: authorization.as_ref().map(|given| given.secret.clone()),
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

/// The header that the source's server wants.
const fn authorization(source: &ImportSource) -> Option<&HttpAuthorization> {
    match source {
        ImportSource::Http {
            authorization: Some(given),
            ..
        } => Some(&given.value),
        _ => None,
    }
}

/// The cgroup of an import process.
fn cgroup_name(disk: DiskId) -> String {
    format!("{VMS}/import-{disk}")
}

fn kill(pid: u32) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(pid)?).context("process id")?;
    match kill_process(pid, Signal::KILL) {
        // The process has ended already.
        Err(rustix::io::Errno::SRCH) => Ok(()),
        done => Ok(done?),
    }
}

fn read_report(path: &Path) -> Option<ImportReport> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// What is said of a process that wrote no last report.
const KILLED: &str =
    "the import process was killed before it was done, perhaps because the node ran out of memory";
/// How long a command waits for a killed process, which ends only when its write in flight has completed.
const COMMAND_LIMIT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;
