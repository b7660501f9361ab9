//! A failed disk. The home volume gets a report, because a write of this virtual machine may still land.
//! The guest sees an I/O error or, with the policy to pause, is paused until it is resumed on request.

use std::time::Duration;

use anyhow::Context as _;
use bascule_devices::failure::DeviceFailure;
use bascule_ipc::Kind;
use bascule_ipc::vm::{DiskConfig, DiskError, DiskSource, VmConfig};
use bascule_types::OnError;

use super::phase::Phase;
use super::vm_actor::{PauseFor, VmActor};

/// Pause between two attempts to report to a volume that does not respond.
const PAUSE: Duration = Duration::from_secs(1);

impl VmActor {
    /// Pauses the guest for a request that its disk holds back, or reports a failed write.
    pub(super) fn disk_failed(&mut self, failure: &DeviceFailure) {
        match held(&self.config, failure) {
            Some(error) => self.pause_for(error),
            None => self.report_failure(failure),
        }
    }

    /// In every other phase the guest is paused or ends already; when it runs again, the disk tries again.
    fn pause_for(&mut self, error: DiskError) {
        let (disk, what) = (&error.disk, &error.what);
        tracing::error!(disk, what, "the guest is paused for a disk error");
        self.disk_error = Some(error);
        if let Phase::Running(_) = self.phase
            && let Err(error) = self.pause(PauseFor::DiskError)
        {
            tracing::warn!(error = format_args!("{error:#}"), "cannot pause the guest");
        }
    }

    /// [`bascule_ipc::vm::Request::ReportDiskErrors`].
    pub(super) fn report_disk_errors(&mut self, disk: &str) -> anyhow::Result<()> {
        let mut policies = self.devices.policies.iter();
        let policy = policies.find(|(name, _)| name == disk);
        let (_, policy) = policy.with_context(|| format!("there is no disk {disk:?}"))?;
        policy.set(OnError::Report);
        match self.phase {
            _ if self.disk_error.is_none() => Ok(()),
            Phase::Paused(_) => self.resume(),
            _ => anyhow::bail!(self.refusal()),
        }
    }

    /// Reports to the home volume until it has acknowledged.
    fn report_failure(&self, failure: &DeviceFailure) {
        let (Some(volume), Some(what)) = (self.volume.clone(), on_volume(&self.config, failure))
        else {
            return;
        };
        let report = move || {
            while let Err(error) = volume.report_failure(&what) {
                let gives_up = error.kind() == Kind::Protocol;
                tracing::warn!(%error, gives_up, "cannot report the failed disk to the volume");
                if gives_up {
                    return;
                }
                std::thread::sleep(PAUSE);
            }
        };
        let builder = std::thread::Builder::new().name("disk-failed".to_owned());
        if let Err(error) = builder.spawn(report) {
            tracing::error!(%error, "cannot report the failed disk to the volume");
        }
    }
}

/// The failed disk by its name in the configuration, and how it failed; none for a disk that is not on
/// the home volume.
fn on_volume(config: &VmConfig, failure: &DeviceFailure) -> Option<String> {
    let DeviceFailure::DiskFailed {
        device,
        operation,
        reason,
    } = failure
    else {
        return None;
    };
    let disk = disk_of(config, device)?;
    match disk.source {
        DiskSource::Volume { .. } => Some(format!(
            "{}: disk {:?}: {operation} failed: {reason}",
            config.name, disk.name
        )),
        DiskSource::File { .. } => None,
    }
}

/// The request that a disk holds back; none for another failure.
fn held(config: &VmConfig, failure: &DeviceFailure) -> Option<DiskError> {
    let DeviceFailure::DiskHeld {
        device,
        operation,
        reason,
    } = failure
    else {
        return None;
    };
    let disk = disk_of(config, device).map_or(device, |disk| &disk.name);
    Some(DiskError {
        disk: disk.clone(),
        what: format!("{operation} failed: {reason}"),
    })
}

fn disk_of<'a>(config: &'a VmConfig, device: &str) -> Option<&'a DiskConfig> {
    let index: usize = device.strip_prefix("blk")?.parse().ok()?;
    config.disks.get(index)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;

    use bascule_devices::disk::ErrorPolicy;
    use bascule_ipc::vm::VmState;

    use super::*;
    use crate::process::actor::event::{Event, TaskOutcome};
    use crate::process::run_dir::RunDir;
    use crate::process::testing;
    use crate::testing::{COUNTER, TestVm, kvm_or_skip};

    fn config(sources: Vec<DiskSource>) -> VmConfig {
        let disks = sources.into_iter().zip(["root", "data"]);
        VmConfig {
            disks: disks
                .map(|(source, name)| DiskConfig {
                    name: name.to_owned(),
                    source,
                    on_error: OnError::Report,
                })
                .collect(),
            ..testing::config()
        }
    }

    fn failed(device: &str) -> DeviceFailure {
        DeviceFailure::DiskFailed {
            device: device.to_owned(),
            operation: "flush",
            reason: "Input/output error".to_owned(),
        }
    }

    #[test]
    fn only_a_failed_volume_disk_is_reported_under_its_configured_name() {
        let file = DiskSource::File {
            path: PathBuf::new(),
            read_only: false,
        };
        let row = DiskSource::Volume {
            disk: "shop/web.data".to_owned(),
            read_only: false,
        };
        let config = config(vec![file, row]);
        assert_eq!(on_volume(&config, &failed("blk0")), None);
        assert_eq!(
            on_volume(&config, &failed("blk1")).as_deref(),
            Some("shop/web: disk \"data\": flush failed: Input/output error")
        );
        assert_eq!(on_volume(&config, &failed("blk2")), None);
        let panicked = DeviceFailure::Panicked {
            device: "blk1".to_owned(),
            reason: String::new(),
        };
        assert_eq!(on_volume(&config, &panicked), None);
    }

    #[test]
    fn a_held_request_is_shown_with_its_disk_and_is_no_failure_of_the_volume() {
        let row = DiskSource::Volume {
            disk: "shop/web.root".to_owned(),
            read_only: false,
        };
        let config = config(vec![row]);
        let failure = DeviceFailure::DiskHeld {
            device: "blk0".to_owned(),
            operation: "read",
            reason: "Input/output error".to_owned(),
        };
        let error = held(&config, &failure).unwrap();
        assert_eq!(
            (&*error.disk, &*error.what),
            ("root", "read failed: Input/output error")
        );
        assert_eq!(on_volume(&config, &failure), None);
        assert_eq!(held(&config, &failed("blk0")), None);
    }

    #[test]
    fn a_guest_with_a_held_request_is_paused_and_runs_on_when_its_errors_may_be_reported() {
        if !kvm_or_skip() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::of(&folder.path().join("config.json"));
        let file = DiskSource::File {
            path: PathBuf::new(),
            read_only: false,
        };
        let (mut actor, inbox) = VmActor::new(config(vec![file]), run_dir).unwrap();
        let policy = Arc::new(ErrorPolicy::new(OnError::Pause));
        actor.devices.policies.push(("root".to_owned(), policy));
        let (vm, _test) = TestVm::with(COUNTER);
        actor.phase = Phase::Running(vm.run().unwrap());
        actor.disk_failed(&DeviceFailure::DiskHeld {
            device: "blk0".to_owned(),
            operation: "write",
            reason: "No space left on device".to_owned(),
        });
        actor.report_disk_errors("root").unwrap_err();
        let Event::Task(TaskOutcome::Parked(paused)) = inbox.recv().unwrap() else {
            panic!("the guest is not paused");
        };
        actor.parked(paused);
        let status = actor.status();
        assert_eq!(status.state, VmState::Paused);
        assert_eq!(status.disk_error.unwrap().disk, "root");

        actor.report_disk_errors("data").unwrap_err();
        actor.report_disk_errors("root").unwrap();
        let status = actor.status();
        assert_eq!((status.state, status.disk_error), (VmState::Running, None));
        // Again, by an operator that has not seen it yet.
        actor.report_disk_errors("root").unwrap();
    }
}
