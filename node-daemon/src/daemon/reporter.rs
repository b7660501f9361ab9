//! Makes the node's reports to the operator.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use bascule_ipc::volume::VolumeStatus;
use bascule_node_api::report::{NodeReport, VmReport, VolumeReport};
use bascule_types::VmUid;
use bascule_volume_gate::boot_id;

use super::status_poller::StatusPoller;
use crate::processes::supervisor::Supervisor;
use crate::processes::vm_reports::by_name;

/// Makes this node's reports. A process that does not respond delays no report: the operator
/// takes a node without reports for unreachable.
#[derive(Debug)]
pub(crate) struct Reporter {
    supervisor: Arc<Supervisor>,
    vms: StatusPoller<VmUid, Option<VmReport>>,
    volumes: StatusPoller<String, Result<VolumeStatus, String>>,
}

impl Reporter {
    pub(crate) const fn new(supervisor: Arc<Supervisor>) -> Self {
        Self {
            supervisor,
            vms: StatusPoller::new(ROUND_LIMIT, VM_MAX_AGE),
            volumes: StatusPoller::new(ROUND_LIMIT, VOLUME_MAX_AGE),
        }
    }

    /// The complete report, with the last known state of processes that do not respond in time.
    pub(crate) fn report(&mut self) -> Result<NodeReport> {
        self.supervisor.reap();
        Ok(NodeReport {
            node: self.supervisor.identity.node,
            name: self.supervisor.identity.name.clone(),
            release: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: boot_id().map(|id| id.to_string()).unwrap_or_default(),
            kvm_error: self.supervisor.cannot_run(),
            volumes: self.volume_reports()?,
            vms: self.vm_reports()?,
            imports: self.supervisor.import_reports()?,
        })
    }

    fn volume_reports(&mut self) -> Result<Vec<VolumeReport>> {
        let names = self.supervisor.volume_names()?.into_iter().collect();
        let supervisor = Arc::clone(&self.supervisor);
        let answers = (self.volumes).poll(&names, move |name| supervisor.volume_status(name));
        let reports = answers.into_iter().map(|(name, status)| {
            let unresponsive = || Err("its process does not respond".to_owned());
            let status = status.unwrap_or_else(unresponsive);
            VolumeReport {
                node: Some(self.supervisor.uid_on(&name)),
                name,
                status,
            }
        });
        Ok(reports.collect())
    }

    fn vm_reports(&mut self) -> Result<Vec<VmReport>> {
        let specs = Arc::new(self.supervisor.vm_specs()?);
        let request = {
            let (supervisor, specs) = (Arc::clone(&self.supervisor), Arc::clone(&specs));
            move |vm: &VmUid| Some(supervisor.vm_report(*vm, specs.get(vm)?))
        };
        let mut answers = self.vms.poll(&specs.keys().copied().collect(), request);
        let reports = specs.iter().map(|(vm, spec)| {
            let answer = answers.remove(vm).flatten().flatten();
            answer.unwrap_or_else(|| {
                let presence = self.supervisor.presence_without_call(*vm);
                self.supervisor.report_of(*vm, spec, presence)
            })
        });
        Ok(by_name(reports.collect()))
    }
}

/// A process that does not hang answers within milliseconds. The limit delays a report by less than
/// its interval.
const ROUND_LIMIT: Duration = Duration::from_millis(200);
/// A process of a busy node may take some seconds. That a process has ended is seen without a call.
const VM_MAX_AGE: Duration = Duration::from_secs(5);
/// Shorter than a lease, whose remaining validity is part of the answer.
const VOLUME_MAX_AGE: Duration = Duration::from_secs(2);
