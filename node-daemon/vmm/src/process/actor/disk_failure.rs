//! Reporting a failed disk. Its guest sees I/O errors; the home volume gets a report, because writes of
//! this node's other virtual machines to the same device may be lost too.

use std::time::Duration;

use bascule_devices::failure::DeviceFailure;
use bascule_ipc::Kind;
use bascule_ipc::vm::{DiskSource, VmConfig};

use super::vm_actor::VmActor;

/// Pause between two attempts to report to a volume that does not respond.
const PAUSE: Duration = Duration::from_secs(1);

impl VmActor {
    /// Reports to the home volume until it has acknowledged.
    pub(super) fn disk_failed(&self, failure: &DeviceFailure) {
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
    let index: usize = device.strip_prefix("blk")?.parse().ok()?;
    let disk = config.disks.get(index)?;
    match disk.source {
        DiskSource::Volume { .. } => Some(format!(
            "{}: disk {:?}: {operation} failed: {reason}",
            config.name, disk.name
        )),
        DiskSource::File { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use bascule_ipc::vm::{Boot, DiskConfig, ImageSource, StartMode};
    use bascule_types::{Bytes, VmUid};

    use super::*;

    fn config(sources: Vec<DiskSource>) -> VmConfig {
        let disks = sources.into_iter().zip(["root", "data"]);
        VmConfig {
            version: VmConfig::VERSION,
            uid: VmUid::random(),
            name: "shop/web".to_owned(),
            cpus: 1,
            memory: Bytes::mib(64),
            boot: Boot {
                kernel: ImageSource::File {
                    path: PathBuf::new(),
                },
                initrd: None,
                cmdline: String::new(),
            },
            disks: disks
                .map(|(source, name)| DiskConfig {
                    name: name.to_owned(),
                    source,
                })
                .collect(),
            interfaces: Vec::new(),
            home: None,
            start: StartMode::Boot,
            tls_dir: None,
            shutdown_timeout_ms: None,
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
}
