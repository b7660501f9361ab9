//! The status of a VirtualMachine.

use bascule_api::names::condition;
use bascule_api::{
    DiskState, DiskStatus, Fingerprint, InterfaceStatus, Ownership, Phase, Quantity,
    VirtualMachine, VirtualMachineStatus, mac_address, set_condition,
};
use bascule_operator_core::{
    Condition, Fact, ImportPhase, Moment, Observed, VmIntent, VmPhase, VmReport,
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::records::condition_of;

/// The status that a plan's report and what was observed make.
pub(crate) fn status(
    vm: &VirtualMachine,
    intent: &VmIntent,
    observed: &Observed,
    report: &VmReport,
    now: Timestamp,
) -> VirtualMachineStatus {
    let old = vm.status.clone().unwrap_or_default();
    let mut conditions = old.conditions.clone();
    let mut put = |type_: &str, new: &Condition| {
        let state = match new.status {
            Some(true) => "True",
            Some(false) => "False",
            None => "Unknown",
        };
        let mut new = condition_of(type_, state, new.reason, &new.message, now);
        new.observed_generation = vm.metadata.generation;
        set_condition(&mut conditions, new);
    };
    put(condition::READY, &report.ready);
    put(condition::PROTECTED, &report.protected);
    put(condition::IMPORTED, &report.imported);
    let restart = if report.restart_required {
        Condition::new(
            Some(true),
            "SpecChanged",
            "the change takes effect at the next start",
        )
    } else {
        Condition::new(Some(false), "UpToDate", "")
    };
    put(condition::RESTART_REQUIRED, &restart);
    let phase = phase(report.phase);
    let row = observed.row.known();
    let started = phase == Phase::Running
        && !matches!(
            old.phase,
            Some(Phase::Running | Phase::Migrating | Phase::Unknown)
        );
    VirtualMachineStatus {
        observed_generation: vm.metadata.generation,
        phase: Some(phase),
        node: report.node.clone(),
        ownership: row.map(|row| Ownership {
            owner: row.owner.map(|owner| Fingerprint {
                slot: i32::from(owner.slot.0),
                generation: owner.generation.to_string(),
            }),
            epoch: row.epoch.to_string(),
        }),
        migration: report.migration.clone(),
        started_at: if started {
            Some(Time(now))
        } else {
            old.started_at
        },
        recent_restarts: report.restarts.iter().filter_map(|at| time(*at)).collect(),
        stopping_since: report.stopping_since.and_then(time),
        completed: report.completed,
        stop_reason: report.stop_reason.clone().or(old.stop_reason),
        disks: disks(intent, observed, &old.disks),
        interfaces: interfaces(vm),
        conditions,
    }
}

/// The API's word for a phase.
pub(crate) const fn phase(phase: VmPhase) -> Phase {
    match phase {
        VmPhase::Pending => Phase::Pending,
        VmPhase::Importing => Phase::Importing,
        VmPhase::Starting => Phase::Starting,
        VmPhase::Running => Phase::Running,
        VmPhase::Migrating => Phase::Migrating,
        VmPhase::FailingOver => Phase::FailingOver,
        VmPhase::Stopping => Phase::Stopping,
        VmPhase::Stopped => Phase::Stopped,
        VmPhase::Failed => Phase::Failed,
        VmPhase::Deleting => Phase::Deleting,
        VmPhase::Unknown => Phase::Unknown,
    }
}

fn disks(intent: &VmIntent, observed: &Observed, old: &[DiskStatus]) -> Vec<DiskStatus> {
    let Fact::Known(row) = &observed.row else {
        return old.to_vec();
    };
    let describe = |disk: &bascule_operator_core::DiskIntent| {
        let Some(on_volume) = row.disks.iter().find(|r| r.name == disk.row) else {
            return DiskStatus {
                name: disk.name.clone(),
                state: DiskState::Pending,
                size: None,
                imported: None,
                message: String::new(),
            };
        };
        let import = observed
            .imports
            .iter()
            .find(|import| import.disk == on_volume.disk);
        let (state, message) = match import.map(|import| &import.phase) {
            _ if !on_volume.importing => (DiskState::Ready, String::new()),
            Some(ImportPhase::Failed { message }) => (DiskState::Failed, message.clone()),
            _ => (DiskState::Importing, String::new()),
        };
        DiskStatus {
            name: disk.name.clone(),
            state,
            size: Some(Quantity::from_bytes(on_volume.size.0)),
            imported: import
                .filter(|_| on_volume.importing)
                .map(|import| Quantity::from_bytes(import.written.0)),
            message,
        }
    };
    intent.disks.iter().map(describe).collect()
}

fn interfaces(vm: &VirtualMachine) -> Vec<InterfaceStatus> {
    let uid = vm.metadata.uid.as_deref().unwrap_or_default();
    let text = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
    vm.spec
        .interfaces
        .iter()
        .map(|interface| InterfaceStatus {
            name: interface.name.clone(),
            mac: interface
                .mac
                .clone()
                .unwrap_or_else(|| text(mac_address(uid, &interface.name))),
        })
        .collect()
}

fn time(at: Moment) -> Option<Time> {
    Timestamp::from_millisecond(i64::try_from(at.0).ok()?)
        .ok()
        .map(|at| {
            // The API keeps whole seconds.
            Time(Timestamp::from_second(at.as_second()).unwrap_or(at))
        })
}
