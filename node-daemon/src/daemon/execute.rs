//! Executes one command and returns its outcome. It blocks, so the server calls it on its blocking pool.

use bascule_ipc::vm::Request as VmRequest;
use bascule_ipc::volume::Request as VolumeRequest;
use bascule_node_api::command::{Command, Outcome, RejectReason};
use bascule_types::{Ownership, VmUid};

use crate::processes::imports::ImportOrder;
use crate::processes::reservation;
use crate::processes::supervisor::{Rejection, Supervisor};

impl Supervisor {
    /// Executes one command.
    pub(crate) fn execute(&self, command: &Command) -> Outcome {
        let outcome = match vm_of(command) {
            Some(vm) => self.with_vm_lock(vm, || self.dispatch(command)),
            None => self.dispatch(command),
        };
        outcome.unwrap_or_else(|Rejection { reason, message }| {
            tracing::info!(?reason, message, "command rejected");
            Outcome::Rejected { reason, message }
        })
    }

    fn dispatch(&self, command: &Command) -> Result<Outcome, Rejection> {
        match command {
            Command::FormatVolume {
                backing,
                cluster,
                options,
            } => self.format_volume(backing, *cluster, options),
            Command::AttachVolume {
                name,
                backing,
                volume,
                cluster,
            } => self.attach_volume(name, backing, *volume, *cluster),
            Command::DetachVolume { name } => self.detach_volume(name),
            Command::Change { volume, change } => self.change(volume, change.clone()),
            Command::Rows { volume } => self.volume_request(volume, &VolumeRequest::Rows),
            Command::Import {
                volume,
                vm,
                owner,
                epoch,
                disk,
                attempt,
                source,
            } => self.import(&ImportOrder {
                volume,
                vm: *vm,
                owner: *owner,
                epoch: *epoch,
                disk: *disk,
                attempt: Some(*attempt),
                source,
            }),
            Command::CancelImport { disk } => self.cancel_import_soon(*disk),
            Command::StartVm {
                spec,
                owner,
                epoch,
                restore,
            } => self.start_vm(spec, Ownership::new(*owner, *epoch), *restore),
            Command::PrepareIncoming {
                spec,
                attempt,
                owner,
                epoch,
            } => self.prepare_incoming(spec, *attempt, Ownership::new(*owner, *epoch)),
            Command::CollectVm { vm, pid } => self.collect_vm(*vm, *pid),
            Command::ReadSpec { vm } => Ok(Outcome::Spec(Box::new(self.spec_of(*vm)?))),
            Command::ReadConsoleLog { vm } => self.read_console_log(*vm),
            Command::EndReservation { pod_uid } => {
                let ended = reservation::end(pod_uid)?;
                tracing::info!(pod_uid, ended, "reservation ended");
                Ok(Outcome::Done)
            }
            Command::MigrateLive { .. }
            | Command::MigrateQuick { .. }
            | Command::CancelMigration { .. }
            | Command::PowerButton { .. }
            | Command::ReportDiskErrors { .. }
            | Command::StopVm { .. } => self.forward(command),
        }
    }

    /// Forwards the commands that the VM process executes.
    fn forward(&self, command: &Command) -> Result<Outcome, Rejection> {
        let (vm, request) = match command {
            Command::MigrateLive {
                vm,
                attempt,
                peer,
                to,
                limits,
            } => (
                *vm,
                VmRequest::MigrateLive {
                    attempt: *attempt,
                    peer: *peer,
                    to: *to,
                    limits: *limits,
                },
            ),
            Command::MigrateQuick { vm, attempt, to } => (
                *vm,
                VmRequest::MigrateQuick {
                    attempt: *attempt,
                    to: *to,
                },
            ),
            Command::CancelMigration { vm, attempt } => {
                (*vm, VmRequest::CancelMigration { attempt: *attempt })
            }
            Command::PowerButton { vm } => (*vm, VmRequest::PowerButton),
            Command::StopVm { vm } => (*vm, VmRequest::Stop),
            Command::ReportDiskErrors { vm, disk } => {
                let disk = disk.clone();
                (*vm, VmRequest::ReportDiskErrors { disk })
            }
            other => {
                return Err(Rejection::new(
                    RejectReason::Failed,
                    format!("{other:?} is not for a VM process"),
                ));
            }
        };
        self.vm_request(vm, &request)
    }
}

/// The VM whose process a command starts, ends or talks to.
const fn vm_of(command: &Command) -> Option<VmUid> {
    match command {
        Command::StartVm { spec, .. } | Command::PrepareIncoming { spec, .. } => Some(spec.uid),
        Command::MigrateLive { vm, .. }
        | Command::MigrateQuick { vm, .. }
        | Command::CancelMigration { vm, .. }
        | Command::PowerButton { vm }
        | Command::StopVm { vm }
        | Command::ReportDiskErrors { vm, .. }
        | Command::CollectVm { vm, .. } => Some(*vm),
        _ => None,
    }
}
