//! Collects what the planner needs to know about one VM, from the API's stores, the node reports and the
//! volume's ownership records.

use std::collections::BTreeMap;

use bascule_crds::names::{LABEL_TRIGGER, TRIGGER_DRAIN};
use bascule_crds::{
    Failover, FailoverPhase, MigrationPhase, SharedVolume, VirtualMachine, VirtualMachineMigration,
    VirtualMachineStatus,
};
use bascule_ipc::volume::{FencingMode, PathState, Rows};
use bascule_node_api::report::{ImportState, NodeReport};
use bascule_operator_core::{
    self as core, Access, Fact, FailedImports, FailoverView, ImportPhase, ImportView, Moment,
    NodeView, Observed, Peer, PlannerMemory, Process, Reported, RowView, SavedView, Stream,
    VolumeView,
};
use bascule_types::{Epoch, Generation, Owner, SlotId, VmUid};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;

use crate::clock::moment;
use crate::node_clients::NodeState;
use crate::ownership_cache::{coordinates, volume_status};
use crate::reservation_pod;
use crate::reservation_records;
use crate::stores::Stores;

/// The observation of one VM. `rows` is none when the volume's ownership records are not known.
pub(crate) fn observe(
    vm: &VirtualMachine,
    stores: &Stores,
    states: &BTreeMap<String, NodeState>,
    rows: Option<&Rows>,
    memory: &PlannerMemory,
    now: Moment,
) -> Observed {
    let uid: Option<VmUid> = vm.uid().and_then(|uid| uid.parse().ok());
    let volume = &vm.spec.volume;
    let pods = stores
        .pods
        .state_filter(|pod| reservation_pod::belongs_to(pod, vm));
    let ours = |m: &VirtualMachineMigration| {
        m.spec.virtual_machine == vm.name_any() && m.namespace() == vm.namespace()
    };
    let uids = pods.iter().filter_map(|pod| pod.uid()).collect();
    let records = reservation_records::known(vm, &memory.reservations, &uids, now);
    let record_of = |pod: &Pod| {
        records
            .iter()
            .find(|r| Some(&r.uid) == pod.metadata.uid.as_ref())
    };
    let migrations = stores.migrations.state_filter(ours);
    let object = stores.volumes.find(|sv| sv.name_any() == *volume);
    Observed {
        volume: object.map_or(Fact::Absent, |sv| volume_view(&sv, states)),
        nodes: stores
            .nodes
            .state()
            .iter()
            .map(|node| {
                (
                    node.name_any(),
                    node_view(node, states.get(&node.name_any()), volume),
                )
            })
            .collect(),
        row: row_view(uid, rows),
        last_owner: last_owner(vm),
        pods: Fact::Known(
            pods.iter()
                .filter_map(|pod| Some(reservation_pod::view(pod, record_of(pod)?, vm, now)))
                .collect(),
        ),
        foreign_pods: pods
            .iter()
            .filter(|pod| record_of(pod).is_none())
            .map(|pod| reservation_pod::foreign(pod))
            .collect(),
        migrations: Fact::Known(
            migrations
                .iter()
                .filter_map(|m| migration_view(m))
                .collect(),
        ),
        failovers: Fact::Known(failovers(vm, stores)),
        processes: processes(uid, states),
        imports: imports(volume, states),
        memory: PlannerMemory {
            reservations: records.clone(),
            ..planner_memory(vm, memory, now)
        },
    }
}

fn volume_view(sv: &SharedVolume, states: &BTreeMap<String, NodeState>) -> Fact<VolumeView> {
    let name = sv.name_any();
    let fencing = match sv.spec.fencing.mode {
        bascule_crds::FencingMode::LeaseOnly => FencingMode::LeaseOnly,
        // A volume with PersistentReservation is refused and never attached.
        bascule_crds::FencingMode::Watchdog | bascule_crds::FencingMode::PersistentReservation => {
            FencingMode::Watchdog
        }
    };
    Fact::Known(VolumeView {
        fencing,
        file: sv.spec.backing.file.is_some(),
        identified: sv.spec.volume_id.is_some()
            || sv
                .status
                .as_ref()
                .is_some_and(|status| status.volume_id.is_some()),
        peers: peers(&name, states),
    })
}

/// The heartbeat of every slot as the other nodes see it: alive if at least one of them finds that the
/// node may still hold its lease. Of several generations of a slot, the newest counts.
pub(crate) fn peers(volume: &str, states: &BTreeMap<String, NodeState>) -> Vec<Peer> {
    let mut seen: BTreeMap<SlotId, Peer> = BTreeMap::new();
    for state in states.values().filter(|state| state.stream == Stream::Up) {
        let Some(report) = &state.report else {
            continue;
        };
        let Some(status) = volume_status(state, volume) else {
            continue;
        };
        if status.path != PathState::Direct {
            continue;
        }
        let own = report.uid_on(volume);
        for peer in status.peers.iter().filter(|peer| peer.node != own) {
            let new = Peer {
                owner: peer.owner,
                node: peer.node,
                alive: peer.alive,
            };
            let merged = seen.entry(peer.owner.slot).or_insert(new);
            if new.owner.generation > merged.owner.generation {
                *merged = new;
            } else if new.owner == merged.owner {
                merged.alive |= new.alive;
            }
        }
    }
    seen.into_values().collect()
}

fn node_view(node: &Node, state: Option<&NodeState>, volume: &str) -> NodeView {
    let condition = |type_: &str| {
        let conditions = node
            .status
            .as_ref()
            .and_then(|status| status.conditions.as_ref());
        let found = conditions.into_iter().flatten().find(|c| c.type_ == type_);
        found.map_or(Fact::Unknown, |c| Fact::Known(c.status == "True"))
    };
    let report = state.and_then(|state| state.report.as_ref());
    NodeView {
        uid: node.uid().and_then(|uid| uid.parse().ok()),
        cordoned: node
            .spec
            .as_ref()
            .and_then(|spec| spec.unschedulable)
            .unwrap_or(false),
        kubelet_ready: condition("Ready"),
        stream: state.map(|state| state.stream).unwrap_or_default(),
        kvm_error: report.and_then(|report| report.kvm_error.clone()),
        access: report.map_or(Fact::Unknown, |report| access(report, volume)),
    }
}

fn access(report: &NodeReport, volume: &str) -> Fact<Access> {
    let Some(attached) = report.volumes.iter().find(|v| v.name == volume) else {
        return Fact::Absent;
    };
    let Ok(status) = &attached.status else {
        return Fact::Unknown;
    };
    Fact::Known(Access {
        path: status.path,
        reason: status.reason.clone(),
        owner: status.owner,
        watchdog: status.watchdog,
        coordinator: coordinates(status),
    })
}

fn row_view(uid: Option<VmUid>, rows: Option<&Rows>) -> Fact<RowView> {
    let (Some(uid), Some(rows)) = (uid, rows) else {
        return Fact::Unknown;
    };
    let Some(row) = rows.vms.iter().find(|row| row.vm == uid) else {
        return Fact::Absent;
    };
    Fact::Known(RowView {
        owner: row.owner,
        epoch: row.epoch,
        disks: rows.disks.clone(),
        saved: rows
            .saved
            .iter()
            .find(|saved| saved.vm == uid)
            .map(|saved| SavedView {
                epoch: saved.epoch,
                complete: saved.complete.is_some(),
            }),
        fences: rows.fences.clone(),
    })
}

fn processes(uid: Option<VmUid>, states: &BTreeMap<String, NodeState>) -> Vec<Process> {
    // The last report of an unreachable node is not a fact any more.
    let up = states
        .iter()
        .filter(|(_, state)| state.stream == Stream::Up);
    up.filter_map(|(name, state)| Some((name, state.report.as_ref()?)))
        .flat_map(|(name, report)| report.vms.iter().map(move |vm| (name, vm)))
        .filter(|(_, vm)| Some(vm.status.uid) == uid)
        .map(|(name, vm)| Process {
            node: name.clone(),
            alive: vm.alive,
            status: vm.status.clone(),
        })
        .collect()
}

fn imports(volume: &str, states: &BTreeMap<String, NodeState>) -> Vec<ImportView> {
    let up = states
        .iter()
        .filter(|(_, state)| state.stream == Stream::Up);
    up.filter_map(|(name, state)| Some((name, state.report.as_ref()?)))
        .flat_map(|(name, report)| report.imports.iter().map(move |import| (name, import)))
        .filter(|(_, import)| import.volume == volume)
        .map(|(name, import)| ImportView {
            node: name.clone(),
            disk: import.disk,
            attempt: import.attempt,
            downloaded: import.downloaded,
            written: import.written,
            phase: match &import.state {
                ImportState::Running => ImportPhase::Running,
                ImportState::Complete { length } => ImportPhase::Complete { length: *length },
                ImportState::Failed { message, is_final } => ImportPhase::Failed {
                    message: message.clone(),
                    is_final: *is_final,
                },
            },
        })
        .collect()
}

fn migration_view(m: &VirtualMachineMigration) -> Option<core::Migration> {
    let status = m.status.clone().unwrap_or_default();
    let created = m.metadata.creation_timestamp.as_ref();
    let complete = status.conditions.iter().find(|c| c.type_ == "Complete");
    Some(core::Migration {
        name: m.name_any(),
        attempt: m.uid()?.parse().ok()?,
        created: created.map(|at| moment(&at.0)).unwrap_or_default(),
        mode: m.spec.mode,
        target: m.spec.target.clone(),
        downtime: m.spec.downtime.as_ref().and_then(|d| d.to_std().ok()),
        timeout: m.spec.timeout.as_ref().and_then(|d| d.to_std().ok()),
        bandwidth: m.spec.bandwidth.as_ref().and_then(|b| b.to_bytes().ok()),
        cancel: m.spec.cancel || m.metadata.deletion_timestamp.is_some(),
        drain: m
            .labels()
            .get(LABEL_TRIGGER)
            .is_some_and(|trigger| trigger == TRIGGER_DRAIN),
        phase: status.phase.unwrap_or(MigrationPhase::Pending),
        started: status.started_at.as_ref().map(|at| moment(&at.0)),
        source: status.source.clone(),
        source_epoch: status.source_epoch.as_deref().and_then(parse).map(Epoch),
        reason: complete.map(|condition| condition.reason.clone()),
    })
}

fn failovers(vm: &VirtualMachine, stores: &Stores) -> Vec<FailoverView> {
    let uid = vm.uid().unwrap_or_default();
    let records = stores.failovers.state_filter(|f| f.spec.uid == uid);
    records.iter().filter_map(|f| failover_view(f)).collect()
}

/// What the status says of the row. It outlives the operator that wrote it.
fn last_owner(vm: &VirtualMachine) -> Option<(Owner, Epoch)> {
    let ownership = vm.status.as_ref()?.ownership.as_ref()?;
    let owner = ownership.owner.as_ref()?;
    Some((api_owner(owner)?, Epoch(parse(&ownership.epoch)?)))
}

fn api_owner(owner: &bascule_crds::Owner) -> Option<Owner> {
    Some(Owner {
        slot: SlotId(u16::try_from(owner.slot).ok()?),
        generation: Generation(parse(&owner.generation)?),
    })
}

fn failover_view(f: &Failover) -> Option<FailoverView> {
    let status = f.status.clone().unwrap_or_default();
    Some(FailoverView {
        name: f.name_any(),
        node: f.spec.node.clone(),
        owner: api_owner(&f.spec.owner)?,
        epoch: Epoch(parse(&f.spec.epoch)?),
        taken_over: status.taken_over_at.is_some(),
        closed: status.phase.is_some_and(FailoverPhase::is_final),
    })
}

fn planner_memory(vm: &VirtualMachine, memory: &PlannerMemory, now: Moment) -> PlannerMemory {
    let status = vm.status.clone().unwrap_or_default();
    PlannerMemory {
        restarts: status
            .recent_restarts
            .iter()
            .map(|at| moment(&at.0))
            .collect(),
        stopping_since: status.stopping_since.as_ref().map(|at| moment(&at.0)),
        completed: status.completed,
        panics: memory.panics.or_else(|| u32::try_from(status.panics).ok()),
        reported: status.phase.map(|phase| Reported {
            phase,
            node: status.node.clone(),
        }),
        failed_imports: failed_imports(vm, &status, now),
        ..memory.clone()
    }
}

/// The failed imports that the status has on record. A change of the spec brings the next attempt forward.
fn failed_imports(
    vm: &VirtualMachine,
    status: &VirtualMachineStatus,
    now: Moment,
) -> BTreeMap<String, FailedImports> {
    let changed = status.observed_generation != vm.metadata.generation;
    let recorded = status.disks.iter().filter_map(|disk| {
        let failed = FailedImports {
            count: u32::try_from(disk.failed_imports)
                .ok()
                .filter(|count| *count > 0)?,
            next: if changed {
                Some(now)
            } else {
                disk.next_import.as_ref().map(|at| moment(&at.0))
            },
            message: disk.message.clone(),
        };
        Some((disk.name.clone(), failed))
    });
    recorded.collect()
}

fn parse(text: &str) -> Option<u64> {
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use bascule_node_api::report::VolumeReport;
    use bascule_types::NodeUid;

    use super::*;

    /// An operator that has just started knows only the status.
    #[test]
    fn failed_imports_are_read_from_the_status_and_a_changed_spec_is_tried_at_once() {
        let mut vm: VirtualMachine = serde_json::from_value(serde_json::json!({
            "apiVersion": "bascule.dev/v1alpha1",
            "kind": "VirtualMachine",
            "metadata": {"name": "web", "namespace": "shop", "generation": 3},
            "spec": {
                "memory": "512Mi", "volume": "san", "boot": {"kernel": {"hostFile": {"name": "k"}}},
            },
            "status": {"observedGeneration": 3, "disks": [
                {"name": "boot-kernel", "state": "Failed", "failedImports": 2,
                 "nextImport": "1970-01-01T00:01:00Z", "message": "http status: 404"},
                {"name": "root", "state": "Failed", "failedImports": 1, "message": "a qcow2 image"},
                {"name": "data", "state": "Ready"},
            ]},
        }))
        .unwrap();
        let now = Moment(5_000);
        let failed =
            |vm: &VirtualMachine| planner_memory(vm, &PlannerMemory::default(), now).failed_imports;
        let known = failed(&vm);
        assert_eq!(known.len(), 2);
        assert_eq!(
            known["boot-kernel"],
            FailedImports {
                count: 2,
                next: Some(Moment(60_000)),
                message: "http status: 404".to_owned(),
            }
        );
        assert_eq!(known["root"].next, None);
        vm.metadata.generation = Some(4);
        for (_, failed) in failed(&vm) {
            assert_eq!(failed.next, Some(now));
        }
    }

    /// Regression: the volume counted as not attached, which failed migrations to a busy node.
    #[test]
    fn access_to_a_volume_whose_process_does_not_respond_is_unknown_and_not_absent() {
        let report = NodeReport {
            node: NodeUid::from_bytes([1; 16]),
            name: "node-1".to_owned(),
            release: "0".to_owned(),
            boot_id: String::new(),
            kvm_error: None,
            volumes: vec![VolumeReport {
                name: "gold".to_owned(),
                node: None,
                status: Err("the process does not respond".to_owned()),
            }],
            vms: vec![],
            imports: vec![],
        };
        assert_eq!(access(&report, "gold"), Fact::Unknown);
        assert_eq!(access(&report, "silver"), Fact::Absent);
    }
}
