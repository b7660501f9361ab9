//! What this node reports to the operator.

use std::fs;

use anyhow::Result;
use bascule_ipc::vm::{StopReason, VmState, VmStatus};
use bascule_node_api::command::VmSpec;
use bascule_node_api::report::{ImportReport, NodeReport, VmReport, VolumeReport};
use bascule_types::{Bytes, VmUid};

use crate::supervisor::{Supervisor, is_alive};
use crate::vms::{Presence, kvm_error};
use crate::volumes::names_in;

impl Supervisor {
    /// Everything the operator is told of this node.
    pub(crate) fn report(&self) -> Result<NodeReport> {
        self.reap();
        let mut volumes = Vec::new();
        for name in self.volume_names()? {
            let status = self.volume_status(&name);
            volumes.push(VolumeReport { name, status });
        }
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(NodeReport {
            node: self.identity.node,
            name: self.identity.name.clone(),
            release: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: boot_id(),
            kvm_error: kvm_error(),
            volumes,
            vms: self.vm_reports()?,
            imports: self.import_reports()?,
        })
    }

    /// The VM processes of this node.
    pub(crate) fn vm_reports(&self) -> Result<Vec<VmReport>> {
        let mut reports = Vec::new();
        for name in names_in(&self.paths.vms())? {
            let Ok(vm) = name.parse::<VmUid>() else {
                continue;
            };
            // Without its spec a folder is one that is just being made.
            let Ok(bytes) = fs::read(self.paths.vm(vm).join("spec.json")) else {
                continue;
            };
            let Ok(spec) = serde_json::from_slice::<VmSpec>(&bytes) else {
                continue;
            };
            reports.push(self.vm_report(vm, &spec));
        }
        reports.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(reports)
    }

    fn vm_report(&self, vm: VmUid, spec: &VmSpec) -> VmReport {
        let (status, alive) = match self.presence(vm) {
            Presence::Answering(status) => (*status, true),
            Presence::Silent(pid) => (self.last_known(vm, pid, VmState::Starting), is_alive(pid)),
            Presence::Ended(Some(state)) => (self.last_known(vm, 0, state), false),
            Presence::Ended(None) | Presence::Absent => {
                let what = "its process ended without a word (killed?)".to_owned();
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

    /// A status for a process that gives none: the tenure is the one it was started in.
    fn last_known(&self, vm: VmUid, pid: u32, state: VmState) -> VmStatus {
        let config = fs::read(self.paths.vm(vm).join("config.json"))
            .ok()
            .and_then(|bytes| serde_json::from_slice::<bascule_ipc::vm::VmConfig>(&bytes).ok());
        let home = config.and_then(|config| config.home);
        VmStatus {
            uid: vm,
            release: String::new(),
            pid,
            state,
            owner: home.as_ref().map(|home| home.owner),
            epoch: home.map(|home| home.epoch).unwrap_or_default(),
            listening: None,
            migration: None,
            io_stalled: false,
            addresses: Vec::new(),
        }
    }

    pub(crate) fn import_reports(&self) -> Result<Vec<ImportReport>> {
        let mut reports = Vec::new();
        for name in names_in(&self.paths.imports())? {
            if !name.ends_with(".json") {
                continue;
            }
            // A file that is just being replaced is read at the next report.
            let Ok(bytes) = fs::read(self.paths.imports().join(name)) else {
                continue;
            };
            let Ok(report) = serde_json::from_slice(&bytes) else {
                continue;
            };
            reports.push(report);
        }
        Ok(reports)
    }
}

/// The kernel's boot id: another one is another boot.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
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
    use super::*;

    #[test]
    fn a_process_own_memory_is_measured_without_shared_memory() {
        let own = overhead(std::process::id()).unwrap();
        assert!(own > Bytes::mib(1), "{own}");
        assert_eq!(overhead(u32::MAX), None);
    }

    #[test]
    fn this_boot_has_an_id() {
        assert_eq!(boot_id().len(), 36);
    }
}
