//! The reports of this node's VM processes, from their answers or, when a process does not
//! respond or has ended, from the files in its run directory.

use std::collections::BTreeMap;
use std::fs;

use anyhow::Result;
use bascule_ipc::vm::{StopReason, VmState, VmStatus};
use bascule_node_api::command::VmSpec;
use bascule_node_api::report::VmReport;
use bascule_types::{Bytes, VmUid};

use super::supervisor::{Supervisor, is_alive};
use super::vms::{Presence, last_ownership};
use crate::files::names_in;

impl Supervisor {
    /// The VM processes of this node.
    pub(crate) fn vm_reports(&self) -> Result<Vec<VmReport>> {
        let specs = self.vm_specs()?;
        let reports = specs.iter().map(|(vm, spec)| self.vm_report(*vm, spec));
        Ok(by_name(reports.collect()))
    }

    pub(crate) fn vm_specs(&self) -> Result<BTreeMap<VmUid, VmSpec>> {
        let mut specs = BTreeMap::new();
        for name in names_in(&self.paths.vms())? {
            let Ok(vm) = name.parse::<VmUid>() else {
                continue;
            };
            // A folder without a spec is just being created.
            let Ok(bytes) = fs::read(self.paths.vm(vm).join("spec.json")) else {
                continue;
            };
            if let Ok(spec) = serde_json::from_slice(&bytes) {
                specs.insert(vm, spec);
            }
        }
        Ok(specs)
    }

    pub(crate) fn vm_report(&self, vm: VmUid, spec: &VmSpec) -> VmReport {
        self.report_of(vm, spec, self.presence(vm))
    }

    pub(crate) fn report_of(&self, vm: VmUid, spec: &VmSpec, presence: Presence) -> VmReport {
        let (status, alive) = match presence {
            Presence::Responding(status) => (*status, true),
            Presence::Unresponsive(pid) => {
                (self.last_known(vm, pid, VmState::Starting), is_alive(pid))
            }
            Presence::Ended(Some(state)) => (self.last_known(vm, 0, state), false),
            Presence::Ended(None) | Presence::Absent => {
                let what = "its process ended without writing a last state (killed?)".to_owned();
                (
                    self.last_known(vm, 0, VmState::Stopped(StopReason::Failed { what })),
                    false,
                )
            }
        };
        VmReport {
            name: format!("{}/{}", spec.namespace, spec.name),
            volume: spec.volume.clone(),
            overhead: alive.then(|| overhead(status.pid)).flatten(),
            status,
            alive,
        }
    }

    /// A status for a process that does not respond, from the files in its run directory.
    fn last_known(&self, vm: VmUid, pid: u32, state: VmState) -> VmStatus {
        let ownership = last_ownership(&self.paths.vm(vm));
        VmStatus {
            owner: ownership.map(|ownership| ownership.owner),
            epoch: ownership
                .map(|ownership| ownership.epoch)
                .unwrap_or_default(),
            ..VmStatus::bare(vm, pid, state)
        }
    }
}

pub(crate) fn by_name(mut reports: Vec<VmReport>) -> Vec<VmReport> {
    reports.sort_by(|a, b| a.name.cmp(&b.name));
    reports
}

/// Resident memory beyond guest RAM: anonymous and file pages, without the shared memory in which
/// guest RAM is.
fn overhead(pid: u32) -> Option<Bytes> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = |field: &str| -> Option<u64> {
        let line = status.lines().find(|line| line.starts_with(field))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    Some(Bytes((kib("RssAnon:")? + kib("RssFile:")?) * 1024))
}

#[cfg(test)]
mod tests {
    use bascule_ipc::vm::{Boot, Home, ImageSource, StartMode, VmConfig};
    use bascule_types::{Epoch, Generation, Owner, Ownership, SlotId};

    use super::*;

    /// A process that had received a live migration and did not respond was reported with the
    /// ownership of the migration's source.
    #[test]
    fn an_unresponsive_process_is_reported_with_the_ownership_that_it_has_written() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(last_ownership(folder.path()), None);
        let ownership = |epoch| Ownership {
            owner: Owner {
                slot: SlotId(1),
                generation: Generation(7),
            },
            epoch: Epoch(epoch),
        };
        let started = ownership(3);
        let config = VmConfig {
            version: VmConfig::VERSION,
            uid: VmUid::random(),
            name: "default/web".into(),
            cpus: 1,
            memory: Bytes::mib(64),
            boot: Boot {
                kernel: ImageSource::Volume { disk: "k".into() },
                initrd: None,
                cmdline: String::new(),
            },
            disks: Vec::new(),
            interfaces: Vec::new(),
            home: Some(Home {
                socket: "volume.sock".into(),
                owner: started.owner,
                epoch: started.epoch,
            }),
            start: StartMode::Boot,
            tls_dir: None,
            shutdown_timeout_ms: None,
            cloud_init: None,
            user: None,
            guest_agent: false,
            on_panic: bascule_types::OnPanic::default(),
        };
        let put = |name: &str, json: Vec<u8>| fs::write(folder.path().join(name), json).unwrap();
        put("config.json", serde_json::to_vec(&config).unwrap());
        assert_eq!(last_ownership(folder.path()), Some(started));
        put("ownership.json", serde_json::to_vec(&ownership(4)).unwrap());
        assert_eq!(last_ownership(folder.path()), Some(ownership(4)));
    }

    #[test]
    fn a_process_own_memory_is_measured_without_shared_memory() {
        let own = overhead(std::process::id()).unwrap();
        assert!(own > Bytes::mib(1), "{own}");
        assert_eq!(overhead(u32::MAX), None);
    }
}
