//! Status of a VirtualMachine.

use bascule_crds::names::{condition, reason};
use bascule_crds::{
    DiskState, DiskStatus, Ownership, Phase, Quantity, VirtualMachine, VirtualMachineStatus,
    set_condition,
};
use bascule_operator_core::{
    Condition, Fact, ImportPhase, Moment, Observed, ReservationRecord, RowView, VmIntent, VmReport,
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::guest_report::{GuestReport, guest_report};
use crate::kube_api::{api_owner, condition_status, new_condition};
use crate::reservation_records;

/// The new status, from the plan's report and the observation. Facts that are unknown keep their old
/// value. `reservations` are the records after the plan was executed.
pub(crate) fn status(
    vm: &VirtualMachine,
    intent: &VmIntent,
    observed: &Observed,
    report: &VmReport,
    reservations: &[ReservationRecord],
    now: Timestamp,
) -> VirtualMachineStatus {
    let old = vm.status.clone().unwrap_or_default();
    let reservations = reservation_records::status(reservations);
    if report.keep {
        return VirtualMachineStatus {
            reservations,
            ..old
        };
    }
    let phase = report.phase;
    let started = phase == Phase::Running
        && !matches!(
            old.phase,
            Some(Phase::Running | Phase::Migrating | Phase::Unknown)
        );
    let guest = guest_report(vm.spec.guest_agent, observed, started);
    let mut conditions = old.conditions.clone();
    if guest == GuestReport::NoPort {
        conditions.retain(|old| old.type_ != condition::GUEST_AGENT);
    }
    let mut put = |type_: &str, new: &Condition| {
        let mut new = new_condition(
            type_,
            condition_status(new.status),
            new.reason,
            &new.message,
            now,
        );
        new.observed_generation = vm.metadata.generation;
        set_condition(&mut conditions, new);
    };
    put(condition::READY, &report.ready);
    put(condition::PROTECTED, &report.protected);
    put(condition::IMPORTED, &report.imported);
    if let GuestReport::Known(condition, _) = &guest {
        put(condition::GUEST_AGENT, condition);
    }
    if let Some(required) = report.restart_required {
        put(condition::RESTART_REQUIRED, &restart_required(required));
    }
    VirtualMachineStatus {
        observed_generation: vm.metadata.generation,
        phase: Some(phase),
        node: report.node.clone(),
        ownership: match &observed.row {
            Fact::Known(row) => Some(ownership(row)),
            Fact::Unknown => old.ownership,
            Fact::Absent => None,
        },
        migration: report.migration.clone(),
        reservations,
        started_at: if started {
            Some(Time(now))
        } else {
            old.started_at
        },
        recent_restarts: report.restarts.iter().filter_map(|at| time(*at)).collect(),
        stopping_since: report.stopping_since.and_then(time),
        completed: report.completed,
        resets: resets(observed).unwrap_or(old.resets),
        panics: i32::try_from(report.panics).unwrap_or(i32::MAX),
        last_panic: (report.new_panics > 0)
            .then_some(Time(now))
            .or(old.last_panic),
        stop_reason: report.stop_reason.clone().or(old.stop_reason),
        disks: disks(intent, observed, report, &old.disks),
        interfaces: guest.interfaces(vm, &old.interfaces),
        guest: guest.guest(old.guest),
        conditions,
    }
}

fn restart_required(required: bool) -> Condition {
    if !required {
        return Condition::new(Some(false), reason::UP_TO_DATE, "");
    }
    let message = "the change takes effect at the next start, which a reboot of the guest is not";
    Condition::new(Some(true), reason::SPEC_CHANGED, message)
}

fn ownership(row: &RowView) -> Ownership {
    Ownership {
        owner: row.owner.map(api_owner),
        epoch: row.epoch.to_string(),
    }
}

/// The resets of the guest that runs, as its process counts them; none when that is not known.
fn resets(observed: &Observed) -> Option<i32> {
    let Fact::Known(row) = &observed.row else {
        return None;
    };
    let mut processes = observed.processes.iter();
    let own = processes.find(|process| process.alive && process.status.epoch == row.epoch)?;
    Some(i32::try_from(own.status.resets.count).unwrap_or(i32::MAX))
}

fn disks(
    intent: &VmIntent,
    observed: &Observed,
    report: &VmReport,
    old: &[DiskStatus],
) -> Vec<DiskStatus> {
    let Fact::Known(row) = &observed.row else {
        return old.to_vec();
    };
    let describe = |disk: &bascule_operator_core::DiskIntent| {
        let Some(on_volume) = row.disks.iter().find(|r| r.name == disk.row) else {
            return DiskStatus {
                name: disk.name.clone(),
                state: DiskState::Pending,
                size: None,
                downloaded: None,
                imported: None,
                failed_imports: 0,
                next_import: None,
                message: String::new(),
            };
        };
        let import = observed
            .imports
            .iter()
            .find(|import| import.disk == on_volume.disk);
        let failed = report.failed_imports.get(&disk.name);
        let state = match (import.map(|import| &import.phase), failed) {
            _ if !on_volume.importing => DiskState::Ready,
            (Some(ImportPhase::Running | ImportPhase::Complete { .. }), _) | (_, None) => {
                DiskState::Importing
            }
            (_, Some(_)) => DiskState::Failed,
        };
        DiskStatus {
            name: disk.name.clone(),
            state,
            size: Some(Quantity::from_bytes(on_volume.size.0)),
            downloaded: import
                .filter(|_| on_volume.importing)
                .map(|import| Quantity::from_bytes(import.downloaded.0)),
            imported: import
                .filter(|_| on_volume.importing)
                .map(|import| Quantity::from_bytes(import.written.0)),
            failed_imports: failed
                .map_or(0, |failed| i32::try_from(failed.count).unwrap_or(i32::MAX)),
            next_import: failed.and_then(|failed| failed.next).and_then(time),
            message: failed
                .map(|failed| failed.message.clone())
                .unwrap_or_default(),
        }
    };
    intent.disks.iter().map(describe).collect()
}

fn time(at: Moment) -> Option<Time> {
    Timestamp::from_millisecond(i64::try_from(at.0).ok()?)
        .ok()
        .map(|at| {
            // `metav1.Time` has a resolution of one second; the rest would differ at each comparison.
            Time(Timestamp::from_second(at.as_second()).unwrap_or(at))
        })
}

#[cfg(test)]
mod tests {
    use bascule_crds::condition_is;
    use bascule_operator_core::{Reported, VolumeView, plan};
    use serde_json::json;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// A VM that the previous leader reported as running on n1.
    fn vm() -> VirtualMachine {
        serde_json::from_value(json!({
            "apiVersion": "bascule.dev/v1alpha1",
            "kind": "VirtualMachine",
            "metadata": {
                "name": "web", "namespace": "shop", "generation": 3,
                "uid": "6fa459ea-ee8a-4ca4-894e-db77e160355e",
                "finalizers": ["bascule.dev/virtual-machine"],
            },
            "spec": {
                "memory": "512Mi", "volume": "san", "boot": {"kernel": {"hostFile": {"name": "k"}}},
            },
            "status": {
                "observedGeneration": 3, "phase": "Running", "node": "n1",
                "ownership": {"owner": {"slot": 1, "generation": "7"}, "epoch": "5"},
                "conditions": [
                    {"type": "Ready", "status": "True", "reason": "Running", "message": "",
                     "lastTransitionTime": "1970-01-01T00:00:05Z"},
                    {"type": "Protected", "status": "True", "reason": "Protected", "message": "",
                     "lastTransitionTime": "1970-01-01T00:00:06Z"},
                    {"type": "RestartRequired", "status": "True", "reason": "SpecChanged",
                     "message": "", "lastTransitionTime": "1970-01-01T00:00:07Z"},
                ],
            },
        }))
        .unwrap()
    }

    fn unreachable_since(since: u64) -> Observed {
        let mut observed = Observed {
            volume: Fact::Known(VolumeView {
                fencing: bascule_ipc::volume::FencingMode::Watchdog,
                file: false,
                identified: true,
                peers: vec![],
            }),
            ..Observed::default()
        };
        observed.memory.reported = Some(Reported {
            phase: Phase::Running,
            node: Some("n1".to_owned()),
        });
        observed.memory.unknown_since = Some(Moment(since));
        observed
    }

    fn status_at(now: u64) -> VirtualMachineStatus {
        let (vm, observed) = (vm(), unreachable_since(1_000_000));
        let intent = crate::vm_intent::intent(&vm).unwrap();
        let report = plan(&intent, &observed, Moment(now)).report;
        status(&vm, &intent, &observed, &report, &[], at(2_000))
    }

    /// The next plan, of this operator or another, reads its back-off from here.
    #[test]
    fn failed_imports_are_in_the_status() {
        let vm = vm();
        let intent = crate::vm_intent::intent(&vm).unwrap();
        let mut observed = unreachable_since(0);
        observed.row = Fact::Known(RowView {
            disks: vec![bascule_types::DiskRow {
                disk: bascule_types::DiskId::random(),
                name: intent.disks[0].row.clone(),
                vm: Some(intent.uid),
                size: bascule_types::Bytes::mib(1),
                role: bascule_types::DiskRole::Kernel,
                importing: true,
                importer: None,
                extents: vec![],
            }],
            ..RowView::default()
        });
        let mut report = plan(&intent, &observed, Moment(0)).report;
        report.keep = false;
        let failed = |next| bascule_operator_core::FailedImports {
            count: 3,
            next,
            message: "http status: 404".to_owned(),
        };
        let mut disk = |next| {
            let name = "boot-kernel".to_owned();
            report.failed_imports.insert(name, failed(next));
            status(&vm, &intent, &observed, &report, &[], at(2_000)).disks[0].clone()
        };
        let later = disk(Some(Moment(60_000)));
        assert_eq!((later.state, later.failed_imports), (DiskState::Failed, 3));
        assert_eq!(later.next_import, Some(Time(at(60))));
        assert_eq!(later.message, "http status: 404");
        assert_eq!(disk(None).next_import, None);
    }

    /// A qcow2 image is downloaded whole before its disk is filled.
    #[test]
    fn both_halves_of_an_import_are_in_the_status() {
        let vm = vm();
        let intent = crate::vm_intent::intent(&vm).unwrap();
        let mut observed = unreachable_since(0);
        let disk = bascule_types::DiskId::random();
        observed.row = Fact::Known(RowView {
            disks: vec![bascule_types::DiskRow {
                disk,
                name: intent.disks[0].row.clone(),
                vm: Some(intent.uid),
                size: bascule_types::Bytes::mib(8),
                role: bascule_types::DiskRole::Data,
                importing: true,
                importer: None,
                extents: vec![],
            }],
            ..RowView::default()
        });
        observed.imports.push(bascule_operator_core::ImportView {
            node: "a".to_owned(),
            disk,
            attempt: 1,
            downloaded: bascule_types::Bytes::mib(3),
            written: bascule_types::Bytes::mib(2),
            phase: ImportPhase::Running,
        });
        let mut report = plan(&intent, &observed, Moment(0)).report;
        report.keep = false;
        let disk = status(&vm, &intent, &observed, &report, &[], at(2_000)).disks[0].clone();
        let text = |quantity: Option<Quantity>| quantity.map(|quantity| quantity.to_string());
        assert_eq!(text(disk.downloaded).as_deref(), Some("3Mi"));
        assert_eq!(text(disk.imported).as_deref(), Some("2Mi"));
    }

    #[test]
    fn panics_are_in_the_status_with_the_time_of_the_last() {
        let (mut vm, observed) = (vm(), unreachable_since(0));
        let intent = crate::vm_intent::intent(&vm).unwrap();
        let mut report = plan(&intent, &observed, Moment(0)).report;
        report.keep = false;
        let mut told = |panics, new, now| {
            report.panics = panics;
            report.new_panics = new;
            let status = status(&vm, &intent, &observed, &report, &[], at(now));
            vm.status = Some(status.clone());
            (status.panics, status.last_panic)
        };
        assert_eq!(told(0, 0, 2_000), (0, None));
        assert_eq!(told(1, 1, 3_000), (1, Some(Time(at(3_000)))));
        assert_eq!(told(1, 0, 4_000), (1, Some(Time(at(3_000)))));
        // The guest was started anew.
        assert_eq!(told(0, 0, 5_000), (0, Some(Time(at(3_000)))));
        assert_eq!(told(u32::MAX, 1, 6_000), (i32::MAX, Some(Time(at(6_000)))));
    }

    #[test]
    fn an_unreachable_cluster_does_not_change_the_status_at_once() {
        assert_eq!(Some(status_at(1_000_000)), vm().status);
    }

    #[test]
    fn a_lasting_outage_resets_phase_and_ready_and_nothing_else() {
        let (old, new) = (vm().status.unwrap(), status_at(1_060_000));
        assert_eq!(new.phase, Some(Phase::Unknown));
        assert_eq!((new.node, new.ownership), (old.node, old.ownership));
        let ready = new.conditions.iter().find(|c| c.type_ == "Ready").unwrap();
        assert_eq!(ready.status, "Unknown");
        assert_eq!(ready.last_transition_time.0, at(2_000));
        assert!(condition_is(&new.conditions, "RestartRequired"));
    }
}
