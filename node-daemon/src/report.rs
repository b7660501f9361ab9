//! What this node reports to the operator.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use bascule_ipc::vm::{Home, StopReason, VmConfig, VmState, VmStatus};
use bascule_ipc::volume::VolumeStatus;
use bascule_node_api::command::VmSpec;
use bascule_node_api::report::{ImportReport, NodeReport, VmReport, VolumeReport};
use bascule_types::{Bytes, Ownership, VmUid};

use crate::asking::Asker;
use crate::supervisor::{Supervisor, is_alive};
use crate::vms::{Presence, kvm_error};
use crate::volumes::names_in;

/// Makes this node's reports. A process that does not answer keeps none of them waiting: the operator
/// takes a node whose reports stay out for one that is silent.
#[derive(Debug)]
pub(crate) struct Reporter {
    supervisor: Arc<Supervisor>,
    vms: Asker<VmUid, Option<VmReport>>,
    volumes: Asker<String, Result<VolumeStatus, String>>,
}

impl Reporter {
    pub(crate) const fn new(supervisor: Arc<Supervisor>) -> Self {
        Self {
            supervisor,
            vms: Asker::new(PATIENCE, VM_MEMORY),
            volumes: Asker::new(PATIENCE, VOLUME_MEMORY),
        }
    }

    /// Everything the operator is told of this node.
    pub(crate) fn report(&mut self) -> Result<NodeReport> {
        self.supervisor.reap();
        Ok(NodeReport {
            node: self.supervisor.identity.node,
            name: self.supervisor.identity.name.clone(),
            release: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: boot_id(),
            kvm_error: kvm_error(),
            volumes: self.volume_reports()?,
            vms: self.vm_reports()?,
            imports: self.supervisor.import_reports()?,
        })
    }

    fn volume_reports(&mut self) -> Result<Vec<VolumeReport>> {
        let names = self.supervisor.volume_names()?.into_iter().collect();
        let supervisor = Arc::clone(&self.supervisor);
        let answers = (self.volumes).ask(&names, move |name| supervisor.volume_status(name));
        let reports = answers.into_iter().map(|(name, status)| {
            let silent = || Err("its process does not answer".to_owned());
            let status = status.unwrap_or_else(silent);
            VolumeReport { name, status }
        });
        Ok(reports.collect())
    }

    fn vm_reports(&mut self) -> Result<Vec<VmReport>> {
        let specs = Arc::new(self.supervisor.vm_specs()?);
        let question = {
            let (supervisor, specs) = (Arc::clone(&self.supervisor), Arc::clone(&specs));
            move |vm: &VmUid| Some(supervisor.vm_report(*vm, specs.get(vm)?))
        };
        let mut answers = self.vms.ask(&specs.keys().copied().collect(), question);
        let reports = specs.iter().map(|(vm, spec)| {
            let answer = answers.remove(vm).flatten().flatten();
            answer.unwrap_or_else(|| {
                let presence = self.supervisor.presence_unasked(*vm);
                self.supervisor.report_of(*vm, spec, presence)
            })
        });
        Ok(by_name(reports.collect()))
    }
}

impl Supervisor {
    /// The VM processes of this node.
    pub(crate) fn vm_reports(&self) -> Result<Vec<VmReport>> {
        let specs = self.vm_specs()?;
        let reports = specs.iter().map(|(vm, spec)| self.vm_report(*vm, spec));
        Ok(by_name(reports.collect()))
    }

    fn vm_specs(&self) -> Result<BTreeMap<VmUid, VmSpec>> {
        let mut specs = BTreeMap::new();
        for name in names_in(&self.paths.vms())? {
            let Ok(vm) = name.parse::<VmUid>() else {
                continue;
            };
            // Without its spec a folder is one that is just being made.
            let Ok(bytes) = fs::read(self.paths.vm(vm).join("spec.json")) else {
                continue;
            };
            if let Ok(spec) = serde_json::from_slice(&bytes) {
                specs.insert(vm, spec);
            }
        }
        Ok(specs)
    }

    fn vm_report(&self, vm: VmUid, spec: &VmSpec) -> VmReport {
        self.report_of(vm, spec, self.presence(vm))
    }

    fn report_of(&self, vm: VmUid, spec: &VmSpec, presence: Presence) -> VmReport {
        let (status, alive) = match presence {
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

    /// A status for a process that gives none.
    fn last_known(&self, vm: VmUid, pid: u32, state: VmState) -> VmStatus {
        let ownership = last_ownership(&self.paths.vm(vm));
        VmStatus {
            uid: vm,
            release: String::new(),
            pid,
            state,
            owner: ownership.map(|ownership| ownership.owner),
            epoch: ownership
                .map(|ownership| ownership.epoch)
                .unwrap_or_default(),
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

fn by_name(mut reports: Vec<VmReport>) -> Vec<VmReport> {
    reports.sort_by(|a, b| a.name.cmp(&b.name));
    reports
}

/// The ownership of the process in `folder`: as it wrote itself, or else the one it was started for.
fn last_ownership(folder: &Path) -> Option<Ownership> {
    let read = |name: &str| fs::read(folder.join(name)).ok();
    let written = read("ownership.json").and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let started = || {
        let config: VmConfig = serde_json::from_slice(&read("config.json")?).ok()?;
        let Home { owner, epoch, .. } = config.home?;
        Some(Ownership { owner, epoch })
    };
    written.or_else(started)
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

/// A process that is well answers in milliseconds; a report that is this late harms nobody.
const PATIENCE: Duration = Duration::from_millis(200);
/// A process of a busy node may take some seconds. One that has ended says so at once.
const VM_MEMORY: Duration = Duration::from_secs(5);
/// Less than a lease, which is part of the answer.
const VOLUME_MEMORY: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use bascule_ipc::vm::{Boot, ImageSource, StartMode};
    use bascule_types::{Epoch, Generation, Owner, SlotId};

    use super::*;

    /// One that had come by a live migration was reported in the ownership of the node that it came from
    /// when it was killed, or did not answer for a moment.
    #[test]
    fn a_silent_process_is_reported_in_the_tenure_that_it_has_written() {
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

    #[test]
    fn this_boot_has_an_id() {
        assert_eq!(boot_id().len(), 36);
    }
}
